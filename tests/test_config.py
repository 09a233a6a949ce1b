"""The settings of a run: defaults, experiments, and one clear sentence for every mistake."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from train.compose import CONF, compose, resolved_yaml, trained_experts, typed
from train.config import Config, schema
from train.errors import clear_errors, explain
from wan.variants import VARIANTS

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
KEY_BUDGET = 120  # a new key must earn its place


def leaves(file: Path, prefix: str = "") -> dict[str, object]:
    """The keys and values that a YAML file sets, without what is Hydra's own."""

    def walk(values: dict[object, object], path: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in values.items():
            here = f"{path}{name}"
            if isinstance(value, dict) and value and here != "optim.args":
                found |= walk(value, f"{here}.")
            else:
                found[here] = value
        return found

    loaded = OmegaConf.load(file)
    assert isinstance(loaded, DictConfig)
    values = OmegaConf.to_container(loaded)
    assert isinstance(values, dict)
    return walk({k: v for k, v in values.items() if k not in ("defaults", "hydra")}, prefix)


def mistake(arguments: str) -> str:
    """What a user reads who types these arguments."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  (of Hydra, of OmegaConf or ours)
        compose(shlex.split(arguments))
    return explain(caught.value)


def command_of(experiment: str) -> list[str]:
    """The arguments of the command with which the file of an experiment begins."""
    first, command = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    launch = "# accelerate launch train/lora.py "
    assert command.startswith(f"{launch}experiment={experiment}")
    return shlex.split(command.removeprefix(launch))


def test_the_yaml_files_give_the_defaults_of_the_schema() -> None:
    given = (
        leaves(CONF / "config.yaml")
        | leaves(CONF / "model/t2v_a14b.yaml", "model.")
        | leaves(CONF / "optim/adamw.yaml", "optim.")
        | leaves(CONF / "speed/swap.yaml", "speed.")
    )
    given["optim.args"] = {}  # of the optimizer's class: what AdamW takes is no default of another
    assert given == {path: key.default for path, key in schema().items()}


def test_there_are_few_keys_and_each_has_a_meaning() -> None:
    assert len(schema()) <= KEY_BUDGET
    assert not [path for path, key in schema().items() if len(key.doc.split()) < 2]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_begins_with_a_command_that_works(experiment: str) -> None:
    config = compose(command_of(experiment))
    assert trained_experts(config) == VARIANTS[config.model.variant].experts
    assert config.output_dir == f"outputs/{config.name}"


def test_the_smoke_experiment_is_the_demo_in_a_few_steps() -> None:
    smoke, demo = compose(["experiment=smoke"]), compose(["experiment=demo"])
    assert (smoke.model, smoke.data, smoke.timesteps) == (demo.model, demo.data, demo.timesteps)
    assert smoke.steps <= 8 < demo.steps


def test_both_experts_follow_the_common_settings_unless_told_otherwise() -> None:
    config = compose(["experiment=demo", "lora.rank=32", "high.rank=8", "low.steps=70", "steps=90"])
    assert (config.high.rank, config.low.rank) == (8, 32)
    assert (config.high.alpha, config.low.alpha) == (32.0, 32.0)
    assert (config.high.steps, config.low.steps) == (90, 70)


def test_the_resolved_settings_of_a_run_give_the_same_run_again() -> None:
    config = compose(["experiment=demo", "+optim.args.eps=1e-6", "data.trigger='Zørbi'"])
    text = resolved_yaml(config)
    assert "${" not in text
    assert "Zørbi" in text
    again = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    assert isinstance(again, DictConfig)
    assert typed(again) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("lora.rnak=3", "lora.rnak is not a key; did you mean lora.rank (rank of the adapters"),
        ("+lora.rnak=3 experiment=demo", "lora.rnak is not a key; did you mean lora.rank ("),
        ("rnak=3", "or high.rank ("),
        ("zzz=3", "zzz is not a key. conf/config.yaml lists them all."),
        ("experment=demo", "did you mean experiment (a file of conf/experiment)?"),
        ("experiment=dmeo", "no file conf/experiment/dmeo.yaml; did you mean demo?"),
        ("model=5b", "no file conf/model/5b.yaml; there are i2v_a14b, t2v_a14b, ti2v_5b, tiny."),
        ("demo", "demo is not a setting: write key=value"),
        ("'lora.rank=[1'", "lora.rank=[1 cannot be read. Put a value with"),
        ("data.trigger=Zørbi", "letters beyond a to z into two kinds of quotes"),
        ("lora.rank=big", "Expected int, a whole number of at least 1 (rank of the adapters"),
        ("lora=3", "lora is a section, not a key: set lora.rank, lora.alpha"),
        ("optim.args.eps=3", "write +optim.args.eps=…"),
        ("data.path=null experiment=demo", "data.path: "),
        ("'lora.alpha=${lora.rnak}' experiment=demo", "Interpolation key 'lora.rnak' not found"),
        ("model=t2v_a14b", "not set: name (name of the run and of its files), model.path ("),
        ("", "Write name=… model.path=… data.path=… on the command line"),
    ],
)
def test_a_setting_that_does_not_exist_or_fit_is_explained(arguments: str, expected: str) -> None:
    assert expected in mistake(arguments)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("experts=[medium]", "experts is [medium]: expected [high], [low] or [high, low]"),
        ("experts=[]", "experts is []: "),
        ("experts=[low,low]", "experts is [low, low]: "),
        ("lora.rank=0", "lora.rank is 0: expected a whole number of at least 1"),
        ("high.rank=0", "high.rank is 0: "),
        ("steps=-1", "steps is -1: "),
        ("turn_steps=0", "turn_steps is 0: "),
        ("low.learning_rate=nan", "low.learning_rate is nan: expected a number above 0"),
        ("lora.targets=atention", "presets of targets are all, attention, self_attention, ffn"),
        ("lora.targets='blocks.(0'", "is no regular expression"),
        ("+lora.rank_pattern={blocks.9.*: 8}", "matches no linear that gets an adapter"),
        ("+lora.rank_pattern={blocks.1.*: 0}", "expected whole numbers of at least 1"),
        ("lora.kind=loco", "expected one of lora, rslora, dora, lokr, loha"),
        ("lora.ema=1", "lora.ema is 1.0: expected a number above 0 and below 1"),
        ("export.weights=ema", "Set lora.ema=0.999, or export.weights=live"),
        ("model.variant=t2v", "expected one of t2v_a14b, i2v_a14b, ti2v_5b, tiny"),
        ("data.frames=16", "data.frames is 16: expected 4n+1 frames"),
        ("preview.frames=12", "preview.frames is 12: "),
        ("data.caption_dropout=1", "data.caption_dropout is 1.0: "),
        ("data.trigger=' '", "data.trigger is "),
        ("eval.bins=0", "eval.bins is 0: "),
        ("preview.seeds=[]", "preview.seeds is []: "),
        ("name=a/b", "name is a/b: expected a file name"),
        ("optim.name=AdamW", "expected the dotted name of a class"),
        ("optim.warmup_steps=400", "but high.steps is 400"),
        ("+optim.args.lr=1", "the learning rate is set as optim.learning_rate"),
        ("timesteps.scale=2", "no effect with timesteps.base=uniform"),
        ("data.heldout_fraction=0.2", "no effect next to data.heldout_path"),
        ("data.heldout_path=./datasets/demo/train", "what is trained on"),
        ("model.variant=t2v_a14b", "only the variant tiny lies in this repository"),
        ("experts=[single]", "Wan 2.2 T2V pair at toy size) has high and low"),
        ("preview.budget=1", "preview.budget is 1.0: expected a number above 0 and below 1"),
        ("data.windows=3", "no effect with data.extraction=head"),
        ("data.stride=8", "set data.extraction=sliding"),
        ("data.extraction=uniform", "Set data.windows to how many"),
        ("data.scales=[1,0]", "data.scales is [1.0, 0.0]: "),
        ("condition.first_frame=0.5", "it is a setting of Wan 2.2 TI2V-5B"),
        ("condition.last_frame=1", "it is a setting of Wan 2.2 I2V-A14B"),
        ("preview.images=[a.png]", "takes no image"),
        ("+data.mix.x={path: a, weight: 0}", "data.mix.x.weight is 0.0: expected a number above 0"),
        ("+data.mix.x={weight: 2}", "not set: data.mix.x.path (folder, manifest"),
    ],
)
def test_a_value_that_cannot_work_is_refused(setting: str, expected: str) -> None:
    assert expected in mistake(f'experiment=demo "{setting}"')


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rnak: 3", "conf/experiment/mine.yaml: lora.rnak is not a key; did you mean lora.rank ("),
        ("rank: big", "conf/experiment/mine.yaml: lora.rank: Value 'big'"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\nlora:\n  {line}\n")
    assert expected in mistake(f"experiment=mine hydra.searchpath=[file://{tmp_path}]")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def entry(cfg: DictConfig) -> None:
    with clear_errors():
        assert typed(cfg).lora.rank == 9


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int | str | None]:
    """Starts as train/lora.py does, in an empty folder; gives the status that it leaves with."""

    def run(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["lora.py", *arguments])
        with pytest.raises(SystemExit) as left, clear_errors():
            entry()
        return left.value.code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `clear_errors` sets it for good
    return run


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.rnak=3", "error: lora.rnak is not a key; did you mean lora.rank ("),
        ("lora.rank=0", "error: lora.rank is 0: expected a whole number of at least 1 ("),
    ],
)
def test_the_program_prints_one_message_and_leaves_nothing_behind(
    setting: str,
    message: str,
    program: Callable[..., int | str | None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program("experiment=demo", setting) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_program_itself_keeps_its_traceback(
    program: Callable[..., int | str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="== 9"):
        program("experiment=demo", "lora.rank=8")
    assert "error: " not in capsys.readouterr().err  # Python prints it, with its traceback


def test_further_datasets_have_names_of_the_users_choice() -> None:
    config = compose(["experiment=demo", "+data.mix.faces={path: a.csv, weight: 0.5}"])
    source = config.data.mix["faces"]
    assert (source.path, source.weight, source.loss_weight) == ("a.csv", 0.5, 1.0)
    assert resolved_yaml(config).count("a.csv") == 1
    expected = "data.mix.faces.wieght is not a key; did you mean data.mix.faces.weight"
    assert expected in mistake("experiment=demo '+data.mix.faces={path: a, wieght: 2}'")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("model=i2v_a14b preview.prompts=[a]", "set without preview.images"),
        (
            "model=i2v_a14b preview.prompts=[a] preview.images=[b,c]",
            "holds 2 and preview.prompts 1",
        ),
        ("model=ti2v_5b model.high=x", "model.high is x, but Wan 2.2 TI2V-5B has one transformer"),
        ("model=ti2v_5b experts=[low]", "experts holds low, but Wan 2.2 TI2V-5B has single"),
        ("model=ti2v_5b condition.last_frame=1", "it is a setting of Wan 2.2 I2V-A14B"),
    ],
)
def test_settings_that_the_model_does_not_have_are_refused(arguments: str, expected: str) -> None:
    assert expected in mistake(f"name=x data.path=x model.path=x {arguments}")


def test_each_variant_trains_all_of_its_experts_by_default() -> None:
    for name, facts in VARIANTS.items():
        config = compose(["name=x", "data.path=x", "model.path=x", f"model={name}"])
        assert trained_experts(config) == facts.experts
