"""The parts of a Markdown page that a command writes: between `<!-- NAME: ... -->` and `<!-- end of NAME -->`."""

import re
from pathlib import Path

from prefixlib.system import files
from prefixlib.system.errors import UserError


def replace_part(page: Path, name: str, text: str) -> None:
    """Put `text` between the comments of part `name`; the rest of the page stays. Raises UserError without them."""
    before = page.read_text(encoding="utf-8")
    found = re.search(rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- end of {name} -->\n)", before, re.DOTALL)
    if found is None:
        raise UserError(f"{page}: no part <!-- {name}: ... --> with <!-- end of {name} --> to write into")
    after = f"{before[: found.end(1)]}\n{text.strip()}\n\n{before[found.start(2) :]}"
    if after != before:
        files.write_text(page, after)
