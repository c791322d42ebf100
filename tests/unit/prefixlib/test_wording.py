"""What a model reads of a conversation that is too long, or whose template leaves something out."""

import pytest
from transformers import AutoTokenizer

from gpt2.dataset import Format, encode_inputs
from prefixlib.data.conversations import as_chat
from prefixlib.data.tasks import as_group
from prefixlib.data.wording import Wording, fill
from prefixlib.system.errors import UserError
from seq2seq.utils import Collator, Example, encode_sources
from tests.llama2_tiny import make_llama

CHAT = Wording(chat=True)
TOOLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.q }}"
    "{% endfor %}[/{{ m.role }}]{% endfor %}{% for t in tools or [] %}{{ t.name }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_llama(tmp_path_factory.mktemp("m") / "llama", chat=True))


def talk(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    first = [] if system is None else [{"role": "system", "content": system}]
    return as_chat([*first, *({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))])


def shown(tokenizer, source, room, **how):
    (found,) = CHAT.encode([source], tokenizer, [room], **how)
    assert len(found.ids) <= room
    assert tokenizer.decode(found.ids[-found.closing :]).endswith("[assistant]")
    return tokenizer.decode(found.ids), found.cut


@pytest.mark.parametrize("special", [False, True])
def test_the_earliest_turns_go_first(tokenizer, special):
    source = talk("first", "A", "second", "B", "third?", system="Be terse.")
    whole = CHAT.text(source, tokenizer)
    size = len(tokenizer(whole, add_special_tokens=special)["input_ids"])
    how = {"add_special_tokens": special}
    text, cut = shown(tokenizer, source, size, **how)
    assert ("first" in text, cut) == (True, 0)
    text, cut = shown(tokenizer, source, size - 1, **how)
    assert "first" not in text
    assert "A[/" not in text
    assert "Be terse.[/system]\n[user]second[/user]\n[assistant]B[/assistant]\n[user]third?[/user]" in text
    assert cut > 10
    text, _ = shown(tokenizer, source, size - cut - 1, **how)
    assert "second" not in text
    assert "Be terse.[/system]\n[user]third?[/user]" in text
    last = len(tokenizer(CHAT.text(talk("third?"), tokenizer), add_special_tokens=special)["input_ids"])
    text, _ = shown(tokenizer, source, last, **how)
    assert "Be terse." not in text  # the question comes before the system's message
    assert "[user]third?[/user]" in text


@pytest.mark.parametrize("role", ["system", "developer", None])
def test_a_greeting_before_the_first_question_goes_too(tokenizer, role):
    first = [{"role": role, "content": "Be terse."}] if role else []
    messages = [{"role": "assistant", "content": "Hello " * 20}, {"role": "user", "content": "third?"}]
    size = len(tokenizer(CHAT.text(as_chat([*first, *messages[1:]]), tokenizer))["input_ids"])
    text, _ = shown(tokenizer, as_chat([*first, *messages]), size)
    assert "Hello" not in text
    assert ("Be terse." in text) == bool(role)
    assert text.endswith("[user]third?[/user]\n[assistant]")


@pytest.mark.parametrize("said", ["a", "s", "assistant", "]", "x", "\u2603", " a ", "user"])
def test_the_last_message_is_found_by_rendering(tokenizer, said):
    """Its text may be part of the template's own."""
    assert CHAT.ending(talk("Hi", "there", said), tokenizer) == "[/user]\n[assistant]"
    (found,) = CHAT.encode([talk(said)], tokenizer, [1000])
    assert tokenizer.decode(found.ids[-found.closing :]).strip() == "[/user]\n[assistant]"


def test_a_last_turn_that_is_too_long_keeps_what_opens_the_answer(tokenizer):
    source = talk("first", "A", "the " * 50)
    text, cut = shown(tokenizer, source, 50, add_special_tokens=False)
    assert cut > 50
    assert "first" not in text
    assert text.startswith("<s> [user]the the")
    with pytest.raises(UserError, match="the chat template's end alone takes"):
        CHAT.encode([source], tokenizer, [5])


def test_what_a_template_leaves_out_is_said(tokenizer):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"q": "pub"}'}}],
    }
    asked, answer = {"role": "user", "content": "a"}, {"role": "tool", "content": "3"}
    source = as_chat([asked, call, answer])
    with pytest.raises(UserError, match="the base model's chat template leaves out tools: "):
        CHAT.text(source, tokenizer)
    with pytest.raises(UserError, match="the base model's chat template leaves out the column tools: "):
        CHAT.text(as_chat([asked], tools=[{"name": "f"}]), tokenizer)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = TOOLS
        text = CHAT.text(as_chat([asked, call, answer], tools=[{"name": "FIND"}]), tokenizer)
        assert text == "[user]a[/user][assistant]pub[/assistant][tool]3[/tool]FIND"
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        )
        with pytest.raises(UserError, match="leaves out tools"):
            CHAT.text(source, tokenizer)
        with pytest.raises(UserError, match="leaves out the last message"):
            CHAT.ending(as_chat([asked, {"role": "system", "content": "x"}]), tokenizer)
    finally:
        tokenizer.chat_template = template


def test_a_mapping_is_filled_into_the_template():
    wording = Wording("{instruction}\n{input}")
    filled = wording.source({"instruction": "Say", "input": "{instruction}"})
    assert wording.text(filled, None) == "Say\n{instruction}"
    assert wording.text("as it is", None) == "as it is"
    assert Wording("To {source}!").text(Wording("To {source}!").source({"source": "b"}), None) == "To b!"
    assert fill("Sum {up}: {source}!", {"source": "a"}) is None
    with pytest.raises(UserError, match="does not fit the template .*: no column 'input'"):
        wording.source({"instruction": "Say"})
    with pytest.raises(UserError, match="expected a text, found empty ones"):
        wording.source({"instruction": " ", "input": ""})


def gpt2_text(tokenizer, source, room):
    group = as_group("text", source.messages)
    (found,) = encode_inputs("text", [group], tokenizer, Format(wording=CHAT), rooms=[room])
    assert found.cut > 0
    return found.prompt


def seq2seq_text(tokenizer, source, room):
    tokenizer.pad_token = tokenizer.eos_token
    ids, cut = encode_sources(tokenizer, CHAT, [source], room)
    assert cut == 1
    batch = Collator(tokenizer, 0, 1, room, 9, CHAT)([Example(source, ("a",)), Example(talk("b"), ("a",))])
    assert batch["cut"] == 1
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == ids[0]
    assert batch["attention_mask"][1].sum() < len(ids[0])
    return ids[0]


@pytest.mark.parametrize("encode", [gpt2_text, seq2seq_text])
def test_both_trees_keep_the_question(tokenizer, encode):
    source = talk("the " * 20, "A", "second", "B", "a?", system="Be terse.")
    ids = encode(tokenizer, source, 130)
    assert len(ids) <= 130
    text = tokenizer.decode(ids)
    assert "the the" not in text
    assert text.endswith(
        "Be terse.[/system]\n[user]second[/user]\n[assistant]B[/assistant]\n[user]a?[/user]\n[assistant]"
    )
