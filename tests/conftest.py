"""What the tests share: golden numbers, a tiny GPT-2, the real data where it is, running a command as a user would."""

import contextlib
import gc
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: it is read only then
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for each other

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.flags import Settings
from gpt2.prefix_lm import PrefixLM
from gpt2.train_control import PrefixConfig, PrefixTuning
from prefixlib.base_model.load import fuse_gelu
from prefixlib.settings.flags import Parser
from tests import commands
from tests.commands import ROOT, run_command

__all__ = ["ROOT", "run_command"]  # most tests import them from here
GOLDEN = ROOT / "tests" / "golden"
SETTINGS = {"prefix_dropout": 0.0, "prefix_mode": "activation", "format_mode": "cat"}

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cold: the commands of this test start as a user's do, from a new Python")
    commands.install()


def pytest_collection_finish() -> None:
    """From now on look for no garbage among what was imported."""
    gc.freeze()


def pytest_unconfigure() -> None:
    commands.uninstall()


@pytest.fixture(autouse=True)
def start_of_commands(request):
    """Commands start warm, except in tests marked `cold`."""
    with commands.cold() if request.node.get_closest_marker("cold") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets, where PREFIX_TUNING_DATA names their folder."""
    folder = os.environ.get("PREFIX_TUNING_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PREFIX_TUNING_DATA is not set")
    return Path(folder)


@pytest.fixture
def golden_gpt2():
    """The golden tiny GPT-2, its prefix module, and the arrays of the `prefix` case."""
    base = GPT2LMHeadModel(GPT2Config(**json.loads((GOLDEN / "gpt2_config.json").read_text())))
    missing, unexpected = base.load_state_dict(load_file(GOLDEN / "gpt2_base.safetensors"), strict=False)
    assert missing in ([], ["lm_head.weight"])
    assert not unexpected
    base.tie_weights()
    fuse_gelu(base)  # as load_model does
    arrays = load_file(GOLDEN / "gpt2_prefix.safetensors")
    prefix = PrefixTuning(PrefixConfig.for_model(base, preseqlen=5, mid_dim=16, **SETTINGS))
    prefix.load_state_dict(
        {name.removeprefix("prefix."): a for name, a in arrays.items() if name.startswith("prefix.")}
    )
    return base.eval(), prefix, arrays


@pytest.fixture
def tiny_lm():
    """A random PrefixLM small enough for anything: 2 layers, width 16, vocabulary 50, P 3; dropout 0.1 in the base."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64, bos_token_id=49, eos_token_id=49)
    )
    prefix = PrefixTuning(PrefixConfig.for_model(base, preseqlen=3, mid_dim=8, **SETTINGS))
    return PrefixLM(base.eval(), prefix)


def gpt2_settings(*argv: str) -> Settings:
    """A command line of gpt2/ as checked settings."""
    parser = Parser()
    Settings.add_to(parser)
    settings = Settings.from_args(parser.parse_args(argv))
    settings.check()
    return settings


def train_here(launcher: ModuleType, *arguments) -> None:
    """Train in this process as the child of `launcher`, gpt2.train_e2e or seq2seq.train_bart, does."""
    package = importlib.import_module(launcher.__package__)
    package.train(launcher.parse_args([*map(str, arguments)]).settings)


def close(actual: torch.Tensor, reference: torch.Tensor) -> bool:
    """The golden tolerance: 1e-5 x max(1, |reference|max), over the whole tensor."""
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    return (actual - reference).abs().max() <= 1e-5 * max(1.0, reference.abs().max())
