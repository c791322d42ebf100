"""Training an encoder-decoder's prefix: what moves, resuming wherever a run was killed, best checkpoint, early stop."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from prefixlib.errors import UserError
from seq2seq import finetune, lightning_base, model
from seq2seq.callbacks import RESUME, Checkpoints, LogLines
from tests.seq2seq_tiny import make_bart, make_summaries, training_flags

BATCHES = 6  # per epoch: 23 examples in batches of 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    make_bart(root / "bart")
    make_summaries(root / "data")
    return root


def train(place, output, **changes):
    """Run finetune.py here; returns the last prefix's tensors and results.json."""
    finetune.main(training_flags(place / "bart", place / "data", output, **changes))
    return load_file(output / "prefix_model.safetensors"), json.loads((output / "results.json").read_text())


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_at(monkeypatch, callback, hook, call):
    """Let `callback.hook` raise on its `call`-th call, after its work."""
    calls, work = [], getattr(callback, hook)

    def die(self, *arguments, **named):
        work(self, *arguments, **named)
        calls.append(1)
        if len(calls) == call:
            raise Killed

    monkeypatch.setattr(callback, hook, die)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def whole_run(place):
    """Two epochs of 3 steps (2 batches each), dropout in the model and on the prefix."""
    return train(place, place / "whole", gradient_accumulation_steps=2, dropout=0.2)


@pytest.mark.parametrize(
    ("callback", "hook", "call"),
    [
        *((Checkpoints, "on_train_batch_end", batch) for batch in (2, 5, 6, 7, 12)),
        (Checkpoints, "on_validation_end", 1),
        (Checkpoints, "on_train_epoch_end", 1),
        (Checkpoints, "on_train_epoch_end", 2),
    ],
)
def test_resumed_equals_uninterrupted(place, whole_run, tmp_path, monkeypatch, callback, hook, call):
    """Killed after a step, between two steps, on an epoch's last batch, in validation, after an epoch."""
    settings = {"gradient_accumulation_steps": 2, "dropout": 0.2, "save_steps": 1}
    with monkeypatch.context() as patch:
        kill_at(patch, callback, hook, call)
        with pytest.raises(Killed):
            train(place, tmp_path, **settings)
    assert not (tmp_path / "prefix_model.safetensors").exists()
    weights, results = train(place, tmp_path, resume="yes", **settings)
    assert equal(weights, whole_run[0])
    assert results["training"]["steps"] == 6
    for part in ("best", "last"):
        assert results["training"][part] == whole_run[1]["training"][part]
    assert results["training"]["curves"] == whole_run[1]["training"]["curves"]
    assert torch.load(tmp_path / RESUME, weights_only=True)["global_step"] == 6  # a longer run would go on from it


def test_resumed_with_workers_equals_uninterrupted_without(place, whole_run, tmp_path, monkeypatch):
    """Worker processes fetch ahead; what they had fetched when the run was killed is fetched again."""
    settings = {"gradient_accumulation_steps": 2, "dropout": 0.2, "save_steps": 1, "num_workers": 1}
    with monkeypatch.context() as patch:
        kill_at(patch, Checkpoints, "on_train_batch_end", 9)
        with pytest.raises(Killed):
            train(place, tmp_path, **settings)
    weights, _ = train(place, tmp_path, resume="yes", **settings)
    assert equal(weights, whole_run[0])


def test_resumed_with_batches_by_length_equals_uninterrupted(place, tmp_path, monkeypatch):
    settings = {"group_by_length": "yes", "save_steps": 1}
    whole = train(place, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        kill_at(patch, Checkpoints, "on_train_batch_end", 9)
        with pytest.raises(Killed):
            train(place, tmp_path / "killed", **settings)
    with pytest.raises(UserError, match=r"--group_by_length no contradicts .*resume.ckpt"):
        train(place, tmp_path / "killed", resume="yes")
    weights, results = train(place, tmp_path / "killed", resume="yes", **settings)
    assert equal(weights, whole[0])
    assert results["training"]["curves"] == whole[1]["training"]["curves"]


def test_a_prefix_that_started_from_a_text_is_resumed_without_starting_again(place, tmp_path, monkeypatch):
    settings = {"init_text": "sum up", "save_steps": 1, "epoch": 1}
    whole, _ = train(place, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        kill_at(patch, Checkpoints, "on_train_batch_end", 3)
        with pytest.raises(Killed):
            train(place, tmp_path / "killed", **settings)
    monkeypatch.setattr(model, "start_from_text", None)
    assert equal(train(place, tmp_path / "killed", resume="yes", **settings)[0], whole)


def test_half_written_checkpoint_is_never_seen(place, whole_run, tmp_path, monkeypatch):
    """A run killed while it writes its second checkpoint leaves the first one whole."""
    saved = lightning_base.files.sync_file
    calls = []

    def die(path):
        saved(path)
        if path.name.startswith(".resume.ckpt.") and path.suffix == ".partial":
            calls.append(path)
        if len(calls) == 2:
            raise Killed

    monkeypatch.setattr(lightning_base.files, "sync_file", die)
    with pytest.raises(Killed):
        train(place, tmp_path, save_steps=1)
    state = torch.load(tmp_path / RESUME, weights_only=True)
    assert state["global_step"] == 1
    assert set(state["state_dict"]) == {f"prefix.{name}" for name in whole_run[0]}  # the frozen model is no part of it


def test_resume_with_other_settings_is_refused(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, Checkpoints, "on_train_batch_end", 3)
        with pytest.raises(Killed):
            train(place, tmp_path, save_steps=1)
    with pytest.raises(UserError, match=r"--learning_rate 0.5 contradicts .*resume.ckpt, which was made with 0.01"):
        train(place, tmp_path, resume="yes", learning_rate=0.5)
    with pytest.raises(
        UserError, match=r"holds resume.ckpt of an earlier run: --resume yes, --overwrite_output_dir yes"
    ):
        train(place, tmp_path)
    (tmp_path / RESUME).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"resume.ckpt is damaged"):
        train(place, tmp_path, resume="yes")


def test_resuming_an_empty_folder_starts_and_a_finished_run_has_nothing_left(place, tmp_path, caplog):
    """The same weights as without --resume; then exit 0, the files untouched, and the trained model from train()."""
    caplog.set_level("INFO", logger="seq2seq")
    weights, _ = train(place, tmp_path / "a", resume="yes", epoch=1)
    assert f"nothing to resume in {tmp_path / 'a'}: starting from the beginning" in caplog.messages
    assert equal(weights, train(place, tmp_path / "b", epoch=1)[0])
    words = training_flags(place / "bart", place / "data", tmp_path / "a", resume="yes", epoch=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert finetune.main(words) == 0
    assert f"the run in {tmp_path / 'a'} has finished: nothing is left to train" in caplog.messages
    again = finetune.train(finetune.parse_args(words)[0])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    flat = load_file(tmp_path / "a" / "prefix_flat.safetensors")
    assert torch.equal(again.model.prefix.flat()["cross"], flat["encoder_decoder"])
    assert len(again.history["train"]) == BATCHES
    assert again.scores.keys() == {"loss", "rouge1", "rouge2", "rougeL", "length"}


def spy(monkeypatch, seen):
    """Call `seen(module)` after every training step's batch."""
    work = LogLines.on_train_batch_end

    def look(self, trainer, module, *arguments):
        work(self, trainer, module, *arguments)
        seen(module)

    monkeypatch.setattr(LogLines, "on_train_batch_end", look)


@pytest.mark.parametrize(
    "trained",
    [
        {"tuning_mode": "prefixtune"},
        {"tuning_mode": "prefixtune", "label_smoothing": 0.1},
        {"tuning_mode": "finetune"},
        {"tuning_mode": "finetune-top", "top_layers": 1},
        {"tuning_mode": "adaptertune", "adapter_bottleneck": 6},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_accumulated_batches_equal_the_larger_batch(tmp_path, monkeypatch, trained):
    """Batches 1 x 4, 2 x 2 and 4 x 1 of targets of 1 to 9 words, the last step of an epoch smaller than the others.

    Plain gradient descent: Adam makes steps of the same size from gradients of rounding's size.
    """
    still = make_bart(tmp_path / "still", dropout=0.0, attention_dropout=0.0)
    data = make_summaries(tmp_path / "data", train=23)
    targets = [" ".join(["cat", "dog ran"][n % 2] for _ in range(1 + n * 5 % 9)) for n in range(23)]
    (data / "train.target").write_text("".join(f"{line}\n" for line in targets))

    def descend(module):
        return torch.optim.SGD(module.trainable().values(), lr=0.1)

    monkeypatch.setattr(lightning_base.BaseModule, "configure_optimizers", descend)
    monkeypatch.setattr(lightning_base.BaseModule, "on_train_start", lambda *_: None)
    runs = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        output = tmp_path / f"{batch}"
        settings = {"preseqlen": 3, "mid_dim": 8} if trained["tuning_mode"] == "prefixtune" else {}
        settings = {"preseqlen": None, "mid_dim": None, **settings, "max_target_length": 64, "max_grad_norm": 1.0}
        settings |= {"bsz": batch, "gradient_accumulation_steps": accumulated, **trained}
        finetune.main(training_flags(still, data, output, **settings))
        (file,) = [*output.glob("prefix_model.safetensors"), *output.glob("model.safetensors")]
        runs.append((load_file(file), json.loads((output / "results.json").read_text())["training"]))
    start = load_file(still / "model.safetensors")
    for weights, results in runs[1:]:
        assert results["steps"] == 12
        for one, other in zip(results["curves"]["train"], runs[0][1]["curves"]["train"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert results["dev_loss"] == pytest.approx(runs[0][1]["dev_loss"], rel=1e-5)
        for name, tensor in weights.items():
            assert (tensor - runs[0][0][name]).abs().max() < 1e-5, name
    moved = [name for name, tensor in runs[0][0].items() if name not in start or not torch.equal(tensor, start[name])]
    assert moved


def test_only_the_prefix_moves_and_all_of_it(place, tmp_path, monkeypatch):
    """Over six steps with a validation, which decodes without gradients, after every one."""
    prefixes, bases, modes = [], [], set()

    def keep(module):
        prefixes.append({name: tensor.clone() for name, tensor in module.lm.prefix.state_dict().items()})
        bases.append({name: tensor.clone() for name, tensor in module.lm.base.state_dict().items()})
        modes.update(part.training for part in module.modules())

    spy(monkeypatch, keep)
    train(place, tmp_path, eval_steps=1, epoch=1, lr_scheduler="constant")
    assert len(prefixes) == 6
    assert len(prefixes[0]) == 15
    assert all(equal(base, bases[0]) for base in bases)
    for before, after in itertools.pairwise(prefixes):
        unmoved = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
        assert not unmoved
        # wte rows, hidden units and every key and value: no entry of the output bias stands still
        assert all((after[name] != before[name]).all() for name in after if name.endswith("2.bias"))
    assert modes == {True}  # the frozen model too: its dropout is on, as in the original, after validation as before


def test_dropout_of_the_frozen_model_can_be_turned_off(place, tmp_path, monkeypatch):
    losses = {}
    for switch in ("yes", "no"):
        _, results = train(place, tmp_path / switch, use_dropout=switch, epoch=1)
        losses[switch] = results["training"]["curves"]["train"]
    # one training batch is all it takes: without dropout the first loss is the model's own
    assert losses["yes"][0] != losses["no"][0]
    _, again = train(place, tmp_path / "checkpointed", use_dropout="no", epoch=1, gradient_checkpointing="yes")
    assert again["training"]["curves"]["train"] == losses["no"]


def test_dropout_is_drawn_anew_for_every_batch(place, tmp_path):
    """One example four times over, weights as good as still: four losses with dropout, one without."""
    for switch, different in (("yes", 4), ("no", 1)):
        still = {"learning_rate": 1e-30, "n_train": 1, "epoch": 4, "use_dropout": switch}
        _, results = train(place, tmp_path / switch, **still)
        assert len(results["training"]["curves"]["train"]) == 4
        assert len({round(loss, 5) for _, loss in results["training"]["curves"]["train"]}) == different


def test_checkpointing_changes_nothing(place, whole_run, tmp_path):
    weights, _ = train(place, tmp_path, gradient_accumulation_steps=2, dropout=0.2, gradient_checkpointing="yes")
    assert equal(weights, whole_run[0])


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_network_runs_once_a_step_on_p_rows(place, tmp_path, monkeypatch, accumulated, steps):
    """Three branches; six batches in `steps` steps, one validation pass of two batches, whose outputs share a run."""
    shapes = []
    build = model.PrefixTuning

    def watched(config):
        prefix = build(config)
        for branch in prefix.branches:
            getattr(prefix, branch.network).register_forward_hook(lambda _m, inputs, _o: shapes.append(inputs[0].shape))
        return prefix

    monkeypatch.setattr(model, "PrefixTuning", watched)
    train(place, tmp_path, epoch=1, gradient_accumulation_steps=accumulated)
    flattened = 2  # for the best and the last checkpoint
    assert shapes == [(3, 16)] * 3 * (steps + 2 + 1 + flattened)


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, True),
        ({"max_grad_norm": 1.0}, True),
        ({"bf16": "yes"}, True),
        ({"bf16": "yes", "max_grad_norm": 1.0}, False),
        ({"fp16": "yes"}, False),
    ],
)
def test_optimiser_is_fused_but_not_where_that_rules_out_clipping(place, settings, fused):
    parsed, _ = finetune.parse_args(training_flags(place / "bart", place / "data", place, **settings))
    lm = model.new(parsed).lm
    optimizer = lightning_base.BaseModule(lm, parsed, total_steps=10).configure_optimizers()["optimizer"]
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]


def test_bfloat16_with_clipping_trains(place, tmp_path):
    curve = train(place, tmp_path, bf16="yes", max_grad_norm=1.0)[1]["training"]["curves"]["train"]
    assert curve[-1][1] < curve[0][1]


def test_every_process_needs_its_gpu(place, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=r"--num_processes 2: this machine has 1 GPU"):
        finetune.main(training_flags(place / "bart", place / "data", tmp_path))


def test_the_network_is_run_anew_after_training(place, tmp_path):
    """What accumulated batches shared must not answer for a prefix that has moved since."""
    words = training_flags(place / "bart", place / "data", tmp_path, epoch=1, gradient_accumulation_steps=4)
    prefix = finetune.train(finetune.parse_args(words)[0]).model.prefix
    before = prefix.flat()["self"]
    with torch.no_grad():
        prefix.control_trans[-1].bias += 1
    assert torch.allclose(prefix.flat()["self"], before + 1)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accumulated_batches_may_share_a_run_of_the_network(place, tmp_path, monkeypatch, dropout):
    """The same losses as with a run per batch, on four batches a step and on the two left over."""
    settings = {"gradient_accumulation_steps": 4, "dropout": dropout}
    shared = train(place, tmp_path / "shared", **settings)[1]["training"]["curves"]["train"]
    monkeypatch.setattr(lightning_base, "OncePerStep", lambda prefix: None)
    apart = train(place, tmp_path / "apart", **settings)[1]["training"]["curves"]["train"]
    assert len(shared) == len(apart) == 4
    assert [loss for _, loss in shared] == pytest.approx([loss for _, loss in apart], rel=1e-5)


def test_best_checkpoint_and_early_stopping(place, tmp_path, monkeypatch):
    """Validation losses 3, 2, 4, 5: the second is kept, and after two worse ones training ends."""
    losses = iter([3.0, 2.0, 4.0, 5.0, 1.0])
    end = lightning_base.SummarizationModule.on_validation_epoch_end

    def say(self):
        end(self)
        self.validation_result["loss"] = next(losses)

    monkeypatch.setattr(lightning_base.SummarizationModule, "on_validation_epoch_end", say)
    kept = []
    spy(monkeypatch, lambda module: kept.append({n: t.clone() for n, t in module.lm.prefix.state_dict().items()}))
    settings = {"epoch": 9, "val_metric": "loss", "early_stopping_patience": 2}
    weights, results = train(place, tmp_path, **settings)
    assert len(kept) == 4 * BATCHES
    assert results["training"]["best"]["loss"] == 2.0
    assert results["training"]["best"]["step"] == 2 * BATCHES
    assert equal(load_file(tmp_path / "best" / "prefix_model.safetensors"), kept[2 * BATCHES - 1])
    assert equal(weights, kept[-1])


def results_of_validation(monkeypatch, *results):
    """Let the validations of a run give these figures, the last one again and again."""
    rows = itertools.chain(results, itertools.repeat(results[-1]))
    end = lightning_base.SummarizationModule.on_validation_epoch_end

    def say(self):
        end(self)
        self.validation_result |= next(rows)

    monkeypatch.setattr(lightning_base.SummarizationModule, "on_validation_epoch_end", say)


def test_a_score_that_stays_zero_leaves_the_choice_to_the_loss(place, tmp_path, monkeypatch, caplog):
    """One-word answers have no ROUGE-2: the run goes on while the dev loss falls, and says what chose."""
    losses = [3.0, 2.9, 2.8, 2.7, 2.6, 2.6, 2.8]
    results_of_validation(monkeypatch, *({"rouge2": 0.0, "loss": loss} for loss in losses))
    _, results = train(place, tmp_path, eval_steps=1, epoch=2, early_stopping_patience=2)
    assert (results["training"]["best"]["step"], results["training"]["steps"]) == (5, 7)
    (said,) = [message for message in caplog.messages if "at each of the" in message]
    assert said.startswith("rouge2 was 0 at each of the 7 validations, so the lowest dev loss chose")
    assert "ended the run early" in said


def test_what_was_seen_before_a_resumption_counts(place, tmp_path, monkeypatch, caplog):
    results_of_validation(monkeypatch, *({"rouge2": score, "loss": 3.0} for score in (1.0, 0.0)))
    with monkeypatch.context() as patch:
        kill_at(patch, Checkpoints, "on_train_batch_end", 8)
        with pytest.raises(Killed):
            train(place, tmp_path, save_steps=1, epoch=3)
    train(place, tmp_path, save_steps=1, epoch=3, resume="yes")
    assert not [message for message in caplog.messages if "at each of the" in message]


def test_a_run_that_ends_within_an_epoch_is_validated_and_replaces_an_earlier_one(place, tmp_path):
    train(place, tmp_path)
    (tmp_path / "test_beam_1.0").touch()
    weights, results = train(place, tmp_path, max_steps=2, seed=7, overwrite_output_dir="yes")
    assert results["training"]["best"]["step"] == 2
    assert results["training"]["last"]["loss"] == results["training"]["best"]["loss"]
    assert equal(weights, load_file(tmp_path / "best" / "prefix_model.safetensors"))
    assert not (tmp_path / "test_beam_1.0").exists()


def test_a_loss_that_is_no_number_stops_the_run(place, tmp_path):
    with pytest.raises(UserError, match=r"training stopped at step 2: the loss is not a number; try a lower --learn"):
        train(place, tmp_path / "logged", learning_rate=1e30)
    with pytest.raises(UserError, match=r"training stopped at step \d: .* is not finite; try a lower --learning_rate"):
        train(place, tmp_path / "saved", learning_rate=1e30, logging_steps=1000, save_steps=2)
    assert not (tmp_path / "saved" / RESUME).exists()


@pytest.mark.parametrize(
    ("settings", "length", "names"),
    [
        ({"init_shallow": "yes", "init_shallow_word": "no", "mid_dim": None}, 3, 3),
        ({"init_shallow": "yes", "init_shallow_word": "sum up", "mid_dim": None}, 6, 3),
        ({"use_lowdata_token": "yes", "lowdata_token": "sum"}, 3, 15),
        ({"init_text": "sum up"}, 6, 15),
        ({"init_text": "sum up", "init_shallow": "yes", "mid_dim": None}, 6, 3),
        ({"use_deep": "yes", "use_cross_prefix": "no"}, 3, 14),
        ({"use_encoder_prefix": "no", "use_self_prefix": "no"}, 3, 5),
    ],
)
def test_variants_train_and_come_back(place, tmp_path, settings, length, names):
    """Each is trained, saved, loaded for decoding; flags that repeat its settings agree, others are refused."""
    weights, _ = train(place, tmp_path, epoch=1, **settings)
    assert len(weights) == names
    flat = load_file(tmp_path / "prefix_flat.safetensors")
    assert {tensor.shape for tensor in flat.values()} == {(length, 2 * 2 * 16)}
    common = ["--mode=xsum", "--do_train=no", f"--prefix_model_path={tmp_path}", f"--data_dir={place / 'data'}"]
    common += [f"--output_dir={tmp_path}", "--num_beams=2", "--max_length=12", "--min_length=0", "--n_test=2"]
    finetune.main([*common, f"--preseqlen={length}"])
    assert len((tmp_path / "test_beam_1.0").read_text().split("\n")) == 2 + 1
    with pytest.raises(UserError, match=f"--preseqlen 77 contradicts .*, which was trained with preseqlen {length}"):
        finetune.main([*common, "--preseqlen=77"])


def test_fine_tuning_trains_the_whole_model(place, tmp_path):
    flags = training_flags(place / "bart", place / "data", tmp_path, tuning_mode="finetune", mid_dim=None, epoch=1)
    finetune.main(flags)
    before = load_file(place / "bart" / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert set(after) - set(moved) <= {"final_logits_bias"}
    decode = ["--mode=xsum", "--do_train=no", f"--finetune_model_path={tmp_path}", f"--data_dir={place / 'data'}"]
    finetune.main([*decode, f"--output_dir={tmp_path}", "--num_beams=2", "--max_length=12", "--min_length=0"])
    assert len((tmp_path / "test_beam_1.0").read_text().split("\n")) == 5 + 1
