"""Configs, recipes, run folders, checkpoints: plain data, checked before work, never half written."""

import hashlib
import inspect
import json
from contextlib import ExitStack
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from networks import equal_states, state
from torch import nn

from saltflat import AT, L2, MART, TRADES, Box, Ellipsoid, Global, Layerwise, Linf, Natural, parallel, perturbed
from saltflat.data import Images, crop_flip, to_float
from saltflat.inputs import uniform, zero
from saltflat.lab import adversaries, build, checkpoints, record, trainings
from saltflat.lab.climbing import Compiled
from saltflat.lab.config import Awp, Compute, Data, Model, Train, as_text, checked, from_text, number, shown
from saltflat.lab.precision import Cast
from saltflat.lab.recipes import RECIPES, adversary, described
from saltflat.neighbours.adaptive_random_wp import adaptively_drawn, by_coordinate
from saltflat.neighbours.kaggle import along_momentum, momentum
from saltflat.neighbours.l1 import L1
from saltflat.neighbours.random_wp import Gaussian, drawn
from saltflat.neighbours.robust_wp import accumulated
from saltflat.train import Stepped, fit

IMAGES = Images(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 10, 10, "noise")


def with_path(config):
    """With whatever files the recipe asks for."""
    if config.extra.share:
        config = replace(config, extra=replace(config.extra, path="extra.npz"))
    return config if config.data.name == "digits" else replace(config, data=replace(config.data, path="archive"))


@given(st.integers(1, 254))
def test_fractions_of_255_come_back_exactly(numerator):
    assert number(shown(numerator / 255)) == numerator / 255
    assert number(f"{numerator}/255") == numerator / 255


@pytest.mark.parametrize("text", ["lots", "8/0", "1/2/3", "", "nan/1x", None, True, [1]])
def test_what_is_no_number_says_so(text):
    with pytest.raises(ValueError, match="not a number or a fraction such as 8/255"):
        number(text)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_yaml(name):
    config = checked(with_path(RECIPES[name]))
    assert config.recipe == name
    assert from_text(as_text(config)) == config
    assert described(config).endswith(".")
    build.plan(config, 10)


def test_the_published_hyper_parameters():
    """Section 1c of the official scripts' defaults."""
    for data in ("cifar10", "cifar100"):
        at, trades = RECIPES[f"{data}-at-awp"], RECIPES[f"{data}-trades-awp"]
        assert (at.awp.gamma, at.awp.warmup) == (0.01, 0)
        assert (trades.awp.gamma, trades.awp.warmup, trades.objective.beta) == (0.005, 9, 6.0)  # from the tenth epoch
        assert (at.model.name, trades.model.name, trades.model.depth, trades.model.widen_factor) == (
            "preact-resnet18", "wide-resnet", 34, 10,
        )  # fmt: skip
        assert (at.attack.start, trades.attack.start) == ("uniform", "gaussian")
        for config in (at, trades):
            assert (config.attack.norm, config.attack.eps, config.attack.step_size, config.attack.steps) == (
                "Linf",
                8 / 255,
                2 / 255,
                10,
            )
            of = config.optimizer
            assert (of.epochs, of.batch_size, of.learning_rate, of.schedule, of.momentum, of.weight_decay) == (
                200, 128, 0.1, "piecewise", 0.9, 5e-4,
            )  # fmt: skip
            assert (config.attack.mode, config.awp.step_inside, of.clean_forward) == ("eval", False, "none")


@pytest.mark.parametrize(
    ("name", "updates"), [("cifar10-at-awp-official", 13), ("cifar10-trades-awp-official", 3), ("cifar10-at-awp", 1)]
)
def test_official_recipes_update_running_statistics_as_often_as_the_scripts(name, updates):
    config = checked(
        replace(with_path(RECIPES[name]), model=Model("small-resnet", width=4), awp=Awp("awp", 0.01, step_inside=True))
    )
    model = build.network(config, IMAGES)
    next(
        event
        for event in fit(model, IMAGES, {}, build.plan(config, 10), build.optimizer(config, model))
        if isinstance(event, Stepped)
    )
    counts = {buffer.item() for buffer_name, buffer in model.named_buffers() if "num_batches" in buffer_name}
    assert counts == {updates}


BAD = {
    "awp.gamma": ({"awp": {"gamma": -1}}, "greater than or equal to 0, got -1"),
    "attack.eps": ({"attack": {"eps": "lots"}}, "'lots' is not a number or a fraction such as 8/255"),
    "optimizer.batch_size": ({"optimizer": {"batch_size": 0}}, "greater than or equal to 1, got 0"),
    "optimizer.learning_rate": ({"optimizer": {"learning_rate": float("nan")}}, "finite number"),
    "attack.norm": ({"attack": {"norm": "L7"}}, "'Linf' or 'L2', got 'L7'"),
    "atack": ({"atack": {}}, "unexpected keyword argument"),
    "attack.epsilon": ({"attack": {"epsilon": 1}}, "unexpected keyword argument"),
    "data.path": ({"data": {"name": "cifar10"}}, "expected the archive or folder of cifar10, got none"),
    "awp.alternations": ({"awp": {"alternations": 2}}, "needs awp.gamma > 0"),
    "awp.warmup": ({"awp": {"gamma": 0.1, "warmup": 60}}, "expected fewer than optimizer.epochs"),
    "model.depth": ({"model": {"name": "wide-resnet", "depth": 33}}, "expected 6 n"),
    "model.std": ({"model": {"mean": [0.5]}}, "expected as many numbers as model.mean"),
    "data.augment": ({"data": {"augment": "crop-flip"}}, "digits mean other things when mirrored"),
    "extra.path": ({"extra": {"share": 0.5}}, "expected a file of labelled images for a share of 0.5, got none"),
    "extra.share": ({"extra": {"path": "x.npz"}}, "expected a number > 0 for the images of extra.path, got 0"),
    "data.label_smoothing": (
        {"data": {"label_smoothing": 0.1}, "objective": {"name": "mart"}},
        "mart needs classes, not probabilities",
    ),
    "data.mix": ({"data": {"mix": "cutmix"}, "objective": {"name": "mart"}}, "mart needs classes"),
    "data.mix_alpha": ({"data": {"mix_alpha": 0.5}}, "expected 1 without data.mix, got 0.5"),
    "awp.steps": ({"awp": {"method": "arwp", "gamma": 0.1, "steps": 2}}, "arwp has one, expected 1, got 2"),
    "awp.step_size": (
        {"awp": {"method": "robust-wp", "gamma": 0.1, "step_size": 1}},
        "robust-wp has none, expected 0, got 1",
    ),
    "awp.step_inside": (
        {"awp": {"method": "m-rwp", "gamma": 0.1, "share": 0.5, "step_inside": True}},
        "m-rwp steps at w, expected false",
    ),
    "awp.share": ({"awp": {"gamma": 0.1, "share": 0.5, "step_inside": True}}, "expected 1 with awp.step_inside"),
    "awp.increase": ({"awp": {"increase": 2.0}}, "awp has a gamma that stays, expected 0, got 2"),
    "awp.c": ({"awp": {"c": 4.0}}, "belongs to awp.method robust-wp; expected 1.7 with awp, got 4"),
    "awp.eta": ({"awp": {"eta": 4.0}}, "belongs to awp.method arwp"),
    "awp.offset": (
        {"awp": {"method": "sam", "gamma": 0.1, "offset": 4.0}},
        "belongs to awp.method asam; expected 0.01 with sam",
    ),
    "attack.replays": ({"attack": {"replays": 4}, "awp": {"gamma": 0.1, "share": 0.5}}, "expected 0 with awp.share"),
    "attack.final_forward": ({"attack": {"replays": 4, "final_forward": True}}, "expected false with attack.replays"),
    "awp.every": ({"awp": {"every": 3}}, "needs awp.gamma > 0, got 3"),
    "awp.amortised": (
        {"awp": {"method": "fast", "gamma": 0.1, "amortised": True}},
        "expected awp.method awp, sam, asam, got fast",
    ),
    "compute.precision": ({"compute": {"precision": "fp8"}}, "'fp16', got 'fp8'"),
    "compute.compile": (
        {"compute": {"compile": True}, "attack": {"mode": "train"}},
        "expected false with attack.mode train",
    ),
    "compute.fast": ({"compute": {"fast": True}}, "unexpected keyword argument"),
    "model.activation": ({"model": {"activation": "silu"}}, "small-cnn has relu only, got 'silu'"),
    "optimizer.nesterov": ({"optimizer": {"nesterov": True, "momentum": 0}}, "needs optimizer.momentum > 0"),
    "optimizer.swa_from": ({"optimizer": {"swa_from": 0.5, "average": 0.9}}, "expected 0 beside optimizer.average"),
    "optimizer.accumulate": (
        {"optimizer": {"accumulate": 2}, "attack": {"replays": 2}},
        r"expected 1 with attack\.replays, got 2",
    ),
    "optimizer.average": (
        {"optimizer": {"average": 0.9}, "compute": {"spread": "fsdp"}},
        r"expected 0 with compute\.spread fsdp, got 0\.9",
    ),
    "awp.per_rank": ({"awp": {"per_rank": True}}, "expected false without a weight adversary that climbs by itself"),
    "compute.spread": ({"compute": {"spread": "zero-3"}}, "'ddp' or 'fsdp', got 'zero-3'"),
    "compute.sync_batch_norm": (
        {"compute": {"spread": "fsdp", "sync_batch_norm": True}},
        r"expected false with compute\.spread fsdp",
    ),
    "checkpoint_minutes": ({"checkpoint_minutes": -1}, "greater than or equal to 0, got -1"),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_fields_are_named_in_one_line(field):
    tree, words = BAD[field]
    with pytest.raises(ValueError, match=rf"^{field}: .*{words}") as error:
        checked(tree)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "awp", "more", "words"),
    [
        ("awp.amortised", {"gamma": 0}, {}, "needs awp.gamma > 0"),
        ("awp.amortised", {}, {"objective": {"name": "natural"}}, "natural training has no attack"),
        ("awp.steps", {"steps": 2}, {}, "expected 1 with awp.amortised, got 2"),
        ("awp.step_size", {"step_size": 0.5}, {}, "expected 0 with awp.amortised, got 0.5"),
        ("awp.alternations", {"alternations": 2}, {}, "expected 1 with awp.amortised, got 2"),
        ("awp.share", {"share": 0.5}, {}, "expected 1 with awp.amortised, got 0.5"),
        ("attack.replays", {}, {"attack": {"replays": 2}}, "expected 0 with awp.amortised, got 2"),
        ("attack.final_forward", {}, {"attack": {"final_forward": True}}, "expected false with awp.amortised"),
        ("awp.joint_mode", {"joint_mode": "outer", "amortised": False}, {}, "needs awp.amortised"),
        ("awp.every", {"every": 2, "alternations": 2, "amortised": False}, {}, "expected 1 with awp.alternations"),
        ("compute.compile", {"amortised": False}, {"compute": {"compile": True}, "attack": {"replays": 2}}, "replays"),
        (
            "compute.compile",
            {"amortised": False},
            {"compute": {"compile": True}, "objective": {"name": "natural"}},
            "objective.name natural",
        ),
        ("optimizer.accumulate", {}, {"optimizer": {"accumulate": 2}}, "expected 1 with awp.amortised, got 2"),
        (
            "optimizer.accumulate",
            {"method": "fast", "amortised": False},
            {"optimizer": {"accumulate": 2}},
            "expected 1 with awp.method fast, got 2",
        ),
        ("awp.per_rank", {"per_rank": True}, {}, "expected false without a weight adversary that climbs by itself"),
        ("awp.per_rank", {"per_rank": True, "amortised": False, "step_inside": True}, {}, "with awp.step_inside"),
        ("awp.per_rank", {"per_rank": True, "amortised": False}, {"compute": {"spread": "fsdp"}}, "with compute.spr"),
        ("compute.precision", {"method": "arwp", "amortised": False}, {"compute": {"precision": "fp16"}}, "arwp"),
        ("compute.precision", {"method": "robust-wp", "amortised": False}, {"compute": {"precision": "fp16"}}, "rob"),
    ],
)
def test_what_does_not_go_together_is_named_in_one_line(field, awp, more, words):
    with pytest.raises(ValueError, match=f"^{field}: .*{words}") as error:
        checked({"awp": {"gamma": 0.01, "amortised": True, **awp}, **more})
    assert "\n" not in str(error.value)


def test_a_config_of_before_there_was_such_a_section_is_read():
    tree = yaml.safe_load(as_text(Train()))
    del tree["compute"], tree["awp"]["amortised"], tree["awp"]["joint_mode"], tree["awp"]["every"]
    assert from_text(yaml.safe_dump(tree)) == Train()


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", ""])
def test_a_config_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="config: "):
        from_text(text)


def test_sets_are_refused_before_work_if_they_do_not_fit():
    with pytest.raises(ValueError, match=r"data\.validation_examples: expected fewer than the 1200"):
        build.sets(Train(data=Data(validation_examples=1200)))
    with pytest.raises(
        ValueError, match=r"data\.examples: expected at most 1000, which validation leaves of 1200, got 1001"
    ):
        build.sets(Train(data=Data(validation_examples=200, examples=1001)))
    with pytest.raises(ValueError, match=r"data.path: .*nowhere"):
        build.sets(Train(data=Data(name="cifar10", path="nowhere")))
    with pytest.raises(ValueError, match=r"model\.mean: expected 1 numbers"):
        build.network(Train(model=Model(mean=(0.1, 0.2), std=(1.0, 1.0))), build.sets(Train()).train)


def test_sets_of_all_seeds_are_the_same_and_validation_is_not_trained_on():
    one, other = (build.sets(Train(seed=seed)) for seed in (0, 1))
    for name in one.measured:
        assert torch.equal(one.measured[name].images, other.measured[name].images)
    trained = {image.numpy().tobytes() for image in one.train.images}
    assert not trained & {image.numpy().tobytes() for image in one.measured["validation"].images}


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, again, other = (build.network(Train(seed=seed), IMAGES) for seed in (0, 0, 1))
    assert equal_states(state(one), state(again))
    assert not equal_states(state(one), state(other))
    assert torch.equal(torch.get_rng_state(), before)


def test_devices_that_are_not_there_are_refused():
    assert build.device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "gpu", "meta:x", ""):
        with pytest.raises(ValueError, match="device: expected auto or one of cpu"):
            build.device(name)


def test_a_run_folder_is_made_once(tmp_path):
    folder = tmp_path / "run"
    record.create(folder, Train(), record.environment("cpu", 1, None), {"attack": "PGD"})
    assert record.read_config(folder) == Train()
    assert yaml.safe_load((folder / "config.yaml").read_text())["attack"]["eps"] == "8/255"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    with pytest.raises(
        ValueError, match=r"out: expected a folder that does not exist yet, got '.*run' \(go on with --resume"
    ):
        record.create(folder, Train(), {}, {})
    for other in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match=r"run: expected a run folder with a config\.yaml"):
            record.read_config(other)
    (folder / "config.yaml").write_text("seed: many")
    with pytest.raises(ValueError, match=r"run: .*config.yaml: seed: "):
        record.read_config(folder)


def test_metrics_survive_a_cut_and_are_dropped_after_a_state(tmp_path):
    lines = [record.append_metrics(tmp_path, {"epoch": epoch, "loss": epoch / 3}) for epoch in (1, 2, 3)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')
    assert [line["epoch"] for line in record.read_metrics(tmp_path)] == [1, 2, 3]
    record.write_metrics(tmp_path, lines[:2])
    assert record.read_metrics(tmp_path) == [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 2 / 3}]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    record.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), record.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_come_back_and_strange_files_are_refused(tmp_path):
    model, path = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), tmp_path / "w.safetensors"
    checkpoints.save_weights(path, model)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    checkpoints.load_weights(path, other)
    assert equal_states(state(model), state(other))
    for wrong, words in (
        (nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), r"'0.weight' has shape \(2, 3\), expected \(2, 4\)"),
        (nn.Sequential(nn.Linear(3, 2)), "the model lacks '1.bias'"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), "the file lacks '2.bias'"),
    ):
        with pytest.raises(ValueError, match=f"of another architecture: {words}"):
            checkpoints.load_weights(path, wrong)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoints.load_weights(path, other)
    with pytest.raises(ValueError, match="checkpoint: expected a file"):
        checkpoints.load_weights(tmp_path / "none", other)


def whole_state(model, **other):
    state = {
        "model": model.state_dict(),
        "optimizer": {},
        "average": None,
        "ranks": [{"random": torch.get_rng_state(), "random_cuda": None, "memory": {}, "sums": None}],
        "within": None,
    }
    return {
        **state,
        "step": 1,
        "epoch": 1,
        "best": 0.5,
        "before": 0.5,
        "in_a_row": 0,
        "config": "",
        "metrics": [],
        **other,
    }


def test_states_come_back_and_those_that_do_not_fit_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    model = nn.Linear(3, 2)
    path = checkpoints.save_state(tmp_path, whole_state(model))
    found, state = checkpoints.newest_whole(tmp_path, pytest.fail)
    assert (found, state["best"]) == (path, 0.5)
    checkpoints.check_state(path, state, model, averaged=False)
    with pytest.raises(ValueError, match=r"does not fit optimizer\.average"):
        checkpoints.check_state(path, state, model, averaged=True)
    with pytest.raises(ValueError, match="of another architecture: 'weight' has shape"):
        checkpoints.check_state(path, state, nn.Linear(4, 2), averaged=False)
    contents, cut = [], path.read_bytes()[:100]
    for bad in ({"state": Evil()}, {"epoch": 3}, torch.ones(2), whole_state(model, more=1)):
        torch.save(bad, tmp_path / "bad")
        contents.append((tmp_path / "bad").read_bytes())
    for step, content in enumerate([cut, *contents], start=2):  # each under a name that fits
        (tmp_path / f"resume-{step}-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"run: cannot go on from .*resume-{step}-") as error:
            checkpoints.newest_whole(tmp_path, pytest.fail)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_digests_tell_settings_apart():
    assert record.digest({"a": 1, "b": 2}) == record.digest({"b": 2, "a": 1}) != record.digest({"a": 1, "b": 3})


WIRING = {
    "optimizer.epochs": (7, lambda of: of.plan.epochs == 7),
    "optimizer.batch_size": (7, lambda of: of.plan.batch_size == 7),
    "optimizer.accumulate": (4, lambda of: of.named == "accumulated_step" and of.step["micro_batches"] == 4),
    "optimizer.average": (0.5, lambda of: of.plan.average == 0.5),
    "optimizer.momentum": (0.5, lambda of: of.group["momentum"] == 0.5),
    "optimizer.weight_decay": (0.5, lambda of: of.group["weight_decay"] == 0.5),
    "optimizer.learning_rate": (0.5, lambda of: of.plan.learning_rate(0) == 0.5),
    "optimizer.schedule": (
        "cosine",
        lambda of: of.plan.learning_rate(1) == 0 < of.plan.learning_rate(0.5) < of.plan.learning_rate(0),
    ),
    "optimizer.warmup": (10, lambda of: of.plan.learning_rate(0.05) == 0.1 * 0.05 / (10 / 60)),
    "optimizer.clean_forward": ("after", lambda of: of.plan.clean_forward),
    "awp.gamma": (0.5, lambda of: of.plan.ball(0) == Layerwise(0.5)),
    "awp.warmup": (30, lambda of: of.plan.ball(0.49) is None and of.plan.ball(0.5) == Layerwise(0.01)),
    "awp.steps": (3, lambda of: of.step["steps"] == 3),
    "awp.step_size": (0.5, lambda of: of.step["step_size"] == 0.5),
    "awp.alternations": (3, lambda of: of.step["alternations"] == 3),
    "awp.step_inside": (True, lambda of: of.step["step_inside"]),
    "awp.share": (0.5, lambda of: of.step["share"] == 0.5),
    "awp.amortised": (True, lambda of: of.named == "amortised_step" and "climb" not in of.step),
    "awp.every": (3, lambda of: of.plan.perturb_every == 3),
    "compute.precision": ("bf16", lambda of: isinstance(of.step["objective"], Cast)),
    "compute.compile": (True, lambda of: isinstance(of.climbs_on, Compiled)),
    "compute.lean": (False, lambda of: "attack_on" not in of.step),
    "awp.truncated": (True, lambda of: not of.step["where"]("2.weight", of.model[2].weight)),
    "attack.norm": ("L2", lambda of: isinstance(of.attack.ball, L2) and isinstance(of.plan.measure.ball, L2)),
    "attack.eps": (0.5, lambda of: of.attack.ball.radius == of.plan.measure.ball.radius == 0.5),
    "attack.step_size": (0.001, lambda of: of.attack.step_size == of.plan.measure.step_size == 0.001),
    "attack.steps": (7, lambda of: of.attack.steps == 7 and of.plan.measure.steps == 10),
    "attack.start": ("zero", lambda of: of.attack.start is zero and of.plan.measure.start is uniform),
    "attack.mode": ("train", lambda of: of.step["attack_mode"] == "train"),
    "attack.replays": (4, lambda of: of.step.get("replays") == 4),
    "attack.final_forward": (True, lambda of: isinstance(of.attack, build.FinalForwardToo)),
    "objective.name": ("trades", lambda of: of.plan.objective(0) == TRADES(6.0)),
    "objective.beta": (
        3.0,
        lambda of: (
            build.objective(replace(of.config, objective=replace(of.config.objective, name="mart"))) == MART(3.0)
        ),
    ),
    "evaluation.steps": (7, lambda of: of.plan.measure.steps == 7),
    "evaluation.batch_size": (7, lambda of: of.plan.measure_batch_size == 7),
    "seed": (7, lambda of: of.plan.seed == 7),
    "data.augment": ("crop-flip", lambda of: not torch.equal(of.augmented, IMAGES.images)),
    "data.rotation": (15.0, lambda of: not torch.equal(of.augmented, IMAGES.images)),
    "data.cutout": (4, lambda of: not torch.equal(of.augmented, IMAGES.images)),
    "data.mix": ("mixup", lambda of: of.mixed[1].ndim == 2 and not torch.equal(of.mixed[0], of.x)),
    "data.label_smoothing": (0.1, lambda of: of.mixed[1].ndim == 2 and torch.equal(of.mixed[0], of.x)),
    "optimizer.swa_from": (0.5, lambda of: of.plan.swa_from == 0.5),
    "optimizer.l1": (0.1, lambda of: of.plan.objective(0) == L1(AT(), 0.1)),
    "optimizer.nesterov": (True, lambda of: of.group["nesterov"]),
    "optimizer.decayed": ("weights", lambda of: of.groups[-1]["weight_decay"] == 0 < of.group["weight_decay"]),
}
# Fields of the neighbours, each beside the method that it belongs to
OF_METHODS = {
    "robust-wp": {
        "": (None, lambda of: of.step["climb"] is accumulated and of.plan.ball(0) == Global(0.01, relative=True)),
        "c": (0.5, lambda of: of.step["climbed"](None, None, None, None) == 0.0),
    },
    "random-wp": {
        "": (None, lambda of: of.climb is drawn and of.plan.ball(1) == Gaussian(0.01)),
        "increase": (1.0, lambda of: of.plan.ball(1) == Gaussian(0.02)),
    },
    "m-rwp": {"": (None, lambda of: "climb" not in of.step and of.plan.ball(0) == Gaussian(0.01))},
    "arwp": {
        "": (None, lambda of: of.climb is adaptively_drawn and of.step["climb"].keywords["memory"] is of.plan.memory),
        "eta": (0.5, lambda of: of.step["climb"].keywords["eta"] == 0.5),
        "beta": (0.5, lambda of: of.step["climb"].keywords["beta"] == 0.5),
        "shrink": ("coordinate", lambda of: of.step["climb"].keywords["shrink"] is by_coordinate),
    },
    "sam": {"": (None, lambda of: of.climb is perturbed and of.plan.ball(0) == Global(0.01))},
    "asam": {
        "": (None, lambda of: of.climb is perturbed and of.plan.ball(0) == Ellipsoid(0.01, 0.01)),
        "offset": (0.5, lambda of: of.plan.ball(0) == Ellipsoid(0.01, 0.5)),
    },
    "kaggle": {
        "": (None, lambda of: of.plan.ball(0) == Box(0.01) and of.step["climb"].keywords["step"] == Layerwise(1.0)),
        "step_size": (0.5, lambda of: of.step["climb"].keywords["step"] == Layerwise(0.5)),
    },
    "fast": {
        "": (None, lambda of: of.climb is along_momentum and of.step["climb"].keywords["step"] == Layerwise(0.01)),
        "step_size": (0.5, lambda of: of.step["climb"].keywords["step"] == Layerwise(0.5)),
    },
}
EVERYWHERE = {"random-wp", "m-rwp", "arwp", "sam", "asam"}


STEPS = ("double_perturbation_step", "two_batch_step", "free_step", "amortised_step", "accumulated_step")


class PerExample(AT):
    """A loss of 1 for every example."""

    def each(self, model, x, x_adv, y):
        return torch.ones(3)


class Built:
    def __init__(self, config):
        self.config, self.plan = config, build.plan(config, 10)
        self.attack = self.plan.attack(0)
        self.groups = build.optimizer(config, nn.Linear(2, 2)).param_groups
        self.group = self.groups[0]
        self.augmented = self.plan.augment(IMAGES.images, torch.Generator().manual_seed(0))
        self.x = to_float(IMAGES.images)
        self.mixed = self.plan.mix(self.x, IMAGES.labels, torch.Generator().manual_seed(0))
        self.step = self.taken()
        self.climb = getattr(self.step.get("climb"), "func", self.step.get("climb"))
        asked = self.step.get("attack_on")
        self.climbs_on = asked and inspect.getclosurevars(asked).nonlocals["attack_on"]  # of `parallel.on_raw`

    def taken(self):
        """The arguments that the plan's step gives to whichever function takes it, and which one that is."""
        self.model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        with ExitStack() as patches:
            called = {name: patches.enter_context(mock.patch.object(adversaries, name)) for name in STEPS}
            self.plan.step(self.model, self.x, None, optimizer=None, generator=None, objective=PerExample())
        ((self.named, found),) = [(name, step.call_args.kwargs) for name, step in called.items() if step.called]
        return found


def with_field(config, field, value):
    if "." not in field:
        return replace(config, **{field: value})
    section, name = field.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


PLAIN = Train(data=Data(name="parquet", path="x"), awp=Awp("awp", 0.01))


@pytest.mark.parametrize("field", WIRING)
def test_every_field_reaches_what_it_is_about(field):
    value, holds = WIRING[field]
    assert not holds(Built(PLAIN))
    assert holds(Built(with_field(PLAIN, field, value)))


def test_parts_of_a_batch_are_climbed_on_as_the_whole_is():
    config = replace(PLAIN, awp=Awp(gamma=0.01, steps=3, step_size=0.5, step_inside=True))
    given = Built(with_field(config, "optimizer.accumulate", 2)).step
    whole = Built(config).step
    names = ("where", "steps", "step_size", "step_inside", "attack_mode")
    assert [given[name] for name in names[1:]] == [whole[name] for name in names[1:]] == [3, 0.5, True, "eval"]
    assert not given["where"]("bias", nn.Parameter(torch.ones(2)))


def test_fields_of_many_processes_reach_what_they_are_about(monkeypatch):
    """With one process, they change nothing."""
    made = mock.Mock()
    monkeypatch.setattr(parallel, "Replicated", made.replicated)
    monkeypatch.setattr(parallel, "Sharded", made.sharded)
    model = nn.Linear(2, 2)

    def spread(**fields):
        made.reset_mock()
        found = trainings._spread(trainings.Ready(replace(PLAIN, compute=Compute(**fields)), None, None, model))
        return found, made.mock_calls

    alone, calls = spread(spread="fsdp")
    assert isinstance(alone, parallel.Alone)
    assert not calls
    per_rank = with_field(PLAIN, "awp.per_rank", True)
    assert Built(per_rank).climb == Built(PLAIN).climb
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    assert spread()[1] == [mock.call.replicated(model, False)]
    assert spread(sync_batch_norm=True)[1] == [mock.call.replicated(model, True)]
    assert spread(spread="fsdp")[1] == [mock.call.sharded(model, build.parts)]
    assert Built(PLAIN).climb is perturbed
    climb = inspect.getclosurevars(inspect.unwrap(Built(per_rank).climb)).nonlocals["climb"]  # of `parallel.per_rank`
    assert climb is perturbed


def test_the_joint_mode_reaches_the_amortised_step():
    config = with_field(PLAIN, "awp.amortised", True)
    assert Built(config).step["joint_mode"] == "attack"
    assert Built(with_field(config, "awp.joint_mode", "outer")).step["joint_mode"] == "outer"


@pytest.mark.parametrize(("method", "field"), [(of, field) for of, fields in OF_METHODS.items() for field in fields])
def test_every_neighbour_s_field_reaches_what_it_is_about(method, field):
    value, holds = OF_METHODS[method][field]
    config = with_field(PLAIN, "awp.method", method)
    config = with_field(config, "awp.share", 0.5) if method == "m-rwp" else config
    assert not holds(Built(config if field else PLAIN))
    found = Built(checked(with_field(config, f"awp.{field}", value) if field else config))
    assert holds(found)
    assert found.step["where"]("bias", nn.Parameter(torch.ones(2))) == (method in EVERYWHERE)


def test_the_other_choices():
    assert Built(with_field(PLAIN, "optimizer.schedule", "cyclic")).plan.learning_rate(0.4) == 0.1
    assert Built(with_field(PLAIN, "optimizer.schedule", "constant")).plan.learning_rate(1) == 0.1
    assert Built(PLAIN).plan.learning_rate(0.75) == pytest.approx(0.001)
    natural = Built(with_field(PLAIN, "objective.name", "natural"))
    assert natural.attack is None
    assert natural.plan.objective(0) == Natural()
    assert Built(PLAIN).plan.objective(0) == AT()
    starts = {name: Built(with_field(PLAIN, "attack.start", name)).attack.start for name in ("uniform", "gaussian")}
    assert starts["uniform"] is uniform
    noise = starts["gaussian"](Linf(0.1), torch.zeros(10_000, 1), torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(1e-3, rel=0.05)
    for mode in ("zero", "reflect"):
        of = Built(with_field(with_field(PLAIN, "data.augment", "crop-flip"), "data.padding_mode", mode))
        expected = crop_flip(IMAGES.images, padding=4, mode=mode, generator=torch.Generator().manual_seed(0))
        assert torch.equal(of.augmented, expected)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (Model("mlp", width=16), 64 * 3 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10),
        (Model("small-resnet", width=8), None),
        (Model("small-cnn", width=8), None),
        (Model("wide-resnet", depth=10, widen_factor=1), None),
        (Model("preact-resnet18"), 11_172_170),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_networks_are_built_to_size(model, parameters):
    made = build.network(Train(model=model), IMAGES)
    count = sum(parameter.numel() for parameter in made.parameters())
    assert parameters is None or count == parameters
    assert made(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    if model.width:
        assert (
            sum(
                p.numel()
                for p in build.network(Train(model=replace(model, width=2 * model.width)), IMAGES).parameters()
            )
            > 2 * count
        )


def test_input_normalisation_stands_in_the_network():
    config = Train(model=Model("mlp", mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.25)))
    x = torch.rand(2, 3, 8, 8)
    scaled = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1)
    plain = build.network(Train(model=Model("mlp")), IMAGES)
    torch.testing.assert_close(build.network(config, IMAGES)(x), plain(scaled))


FIELDS = {
    "": "recipe seed device threads checkpoint_minutes keep_every",
    "compute": "precision compile lean spread sync_batch_norm",
    "data": (
        "name path stored workers examples validation_examples augment padding padding_mode rotation cutout mix "
        "mix_alpha label_smoothing"
    ),
    "extra": "path share",
    "model": "name width depth widen_factor mean std activation initial",
    "objective": "name beta",
    "attack": "norm eps step_size steps start mode replays stop_on_collapse final_forward",
    "awp": (
        "method gamma warmup steps step_size alternations step_inside share truncated amortised joint_mode every c "
        "increase eta beta per_rank shrink offset"
    ),
    "optimizer": (
        "epochs batch_size accumulate learning_rate schedule warmup momentum nesterov weight_decay l1 decayed "
        "average swa_from clean_forward"
    ),
    "evaluation": "steps examples batch_size",
}


def test_a_config_s_fields_are_these():
    """A name that people have in their files and commands does not go, nor does one come unnoticed."""
    found = {"": " ".join(field.name for field in fields(Train) if field.name not in FIELDS)}
    for section in list(FIELDS)[1:]:
        found[section] = " ".join(field.name for field in fields(getattr(Train(), section)))
    assert found == FIELDS


def test_amortised_awp_has_a_name_of_its_own():
    assert adversary(Awp(gamma=0.1)) == ("AWP", "awp")
    assert adversary(Awp(gamma=0.1, amortised=True)) == ("amortised AWP", "awp-amortised")
    assert adversary(Awp("sam", gamma=0.1, amortised=True)) == ("amortised SAM", "sam-amortised")
    outer = Awp(gamma=0.1, amortised=True, joint_mode="outer")
    assert adversary(outer) == ("amortised AWP, training mode", "awp-amortised")
    assert "AT + amortised AWP (gamma 0.01) on" in described(RECIPES["at-awp-amortised"])
    assert "AT + amortised AWP, training mode (gamma 0.01) on" in described(RECIPES["cifar10-at-awp-amortised"])
    every = replace(RECIPES["at-awp"], awp=Awp(gamma=0.01, every=3), compute=Compute("bf16"))
    assert described(every).startswith("AT-AWP (gamma 0.01), every 3 steps, bf16 on")


@pytest.mark.parametrize("name", [name for name, config in RECIPES.items() if config.awp.amortised])
def test_amortised_recipes_of_networks_with_batch_norm_climb_in_the_mode_of_training(name):
    model = build.network(RECIPES[name], IMAGES)
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert RECIPES[name].awp.joint_mode == ("outer" if normalised else "attack")
    assert Awp().joint_mode == "attack"


@pytest.mark.parametrize(("nesterov", "decayed"), [(False, "all"), (True, "weights")])
def test_the_fused_optimiser_is_torch_s_ordinary_one_up_to_rounding(nesterov, decayed):
    """Gradients lie in memory as weights do, channels-last; else it would add what does not belong together."""
    config = Train(model=Model("small-resnet", width=4))
    config = replace(config, optimizer=replace(config.optimizer, nesterov=nesterov, decayed=decayed))
    models = [build.network(config, IMAGES).double() for _ in range(2)]
    fused = build.optimizer(config, models[0])
    groups = build.optimizer(config, models[1]).param_groups
    for group in groups:
        group |= {"fused": False, "foreach": False}
    plain = torch.optim.SGD(groups)
    assert all(group["fused"] for group in fused.param_groups)
    for _ in range(4):
        for model, optimizer in zip(models, (fused, plain), strict=True):
            optimizer.zero_grad()
            AT().outer(model, None, to_float(IMAGES.images).double(), IMAGES.labels).backward()
            assert all(p.grad.stride() == p.stride() for p in model.parameters())
            optimizer.step()
    assert any(not p.is_contiguous() for p in models[0].parameters())
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    found, expected = momentum(models[0], fused), momentum(models[1], plain)  # what fast AWP goes along
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
