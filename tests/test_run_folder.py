"""The folder of a run: earlier results are moved aside, and files are named as loaders expect."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from data.items import Dropped
from tests import toy_runs
from train.compose import resolved_yaml, trained_experts
from train.config import Config
from train.dataset import Clips
from train.encode import EncodedDataset
from train.export import Exporter
from train.learner import Learner, make_learner
from train.lora import check
from train.rules import ConfigError
from train.run_folder import open_run_folder, write_dataset, write_summary
from train.validate import HeldoutLoss
from wan.checkpoints import Model, ModelPaths, component_hash, find_model
from wan.experts import Experts, load_experts
from wan.lora import adapter_parameters, adapter_state
from wan.lora_format import read_adapter
from wan.variants import EXPERTS, Expert, variant

TINY = variant("tiny")
CPU = torch.device("cpu")
LOSSES = [HeldoutLoss("high", 0.5, 0.1, [0.5], [0.875, 1.0])]


def config_of(folder: Path, *overrides: str) -> Config:
    own = [f"output_dir={folder / 'out' / 'toy'}", "data.frames=1", "lora.alpha=3"]
    return toy_runs.config_of(folder / "data", Path("embedded"), *own, *overrides)


@pytest.fixture(scope="module")
def model(toy_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_model)), "tiny")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of three images."""
    path = tmp_path_factory.mktemp("run_folder")
    for seed in range(3):
        toy_runs.make_image(path / "data" / f"{seed}.png", seed, "noise")
    return path


@pytest.fixture(scope="module")
def dataset(home: Path, toy_model: Path) -> EncodedDataset:
    return toy_runs.encoded(config_of(home, f"model.path={toy_model}"))


def trained(
    config: Config, model: Model, dataset: EncodedDataset
) -> tuple[Experts, dict[Expert, Learner]]:
    """A pair whose adapters look trained."""
    experts = load_experts(model, torch.float32, CPU)
    learners: dict[Expert, Learner] = {
        expert: make_learner(expert, config, TINY, experts, dataset)
        for expert in trained_experts(config)
    }
    for steps, expert in enumerate(learners, start=5):
        learners[expert].steps_done = steps
        with torch.no_grad():
            for parameter in adapter_parameters(experts[expert]):
                parameter.copy_(torch.randn_like(parameter))
    return experts, learners


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_folder_is_empty_but_for_the_settings(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    opened = open_run_folder(config, Accelerator())
    assert (opened.checkpoint, opened.finished) == (None, False)
    folder = opened.path
    assert folder == tmp_path / "out" / "toy"
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == resolved_yaml(config)


def test_earlier_runs_are_moved_aside_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for run in range(3):
        folder = open_run_folder(config_of(tmp_path, f"seed={run}"), Accelerator()).path
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
        (folder / "samples").mkdir()
        (folder / "samples" / "sheet.png").write_text(f"run {run}")
    names = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(names) == ["toy", "toy-1", "toy-2"]
    for name, run in [("toy-1", 0), ("toy-2", 1), ("toy", 2)]:
        assert (names[name] / "samples" / "sheet.png").read_text() == f"run {run}"
        assert f"\nseed: {run}\n" in (names[name] / "config.yaml").read_text()
    assert f"{names['toy']} was moved to {names['toy-2']}" in caplog.text


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_in_its_folder(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path)
    folder = open_run_folder(config, Accelerator()).path
    write_dataset(folder, Clips([], [], {}, [Dropped("a.png", "is empty")], []))
    found = json.loads((folder / "dataset.json").read_text())
    assert found["dropped"] == [{"name": "a.png", "reason": "is empty"}]
    for name in (".dataset.json.partial", "report.html", "metrics.jsonl"):
        (folder / name).write_text("")
    (folder / "samples").mkdir()
    (folder / "samples" / ".base.safetensors.7.tmp").write_text("killed while this was written")
    open_run_folder(config, Accelerator())
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]
    (folder / "evaluation").mkdir()  # somebody made it of this run
    open_run_folder(config, Accelerator())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["toy", "toy-1"]


def test_a_run_that_was_killed_before_it_wrote_its_settings_begins_in_its_folder(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path)
    Path(config.output_dir).mkdir(parents=True)
    folder = open_run_folder(config, Accelerator()).path
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]


def test_a_taken_name_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "toy"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.yaml").touch()
    (tmp_path / "out" / "toy-1").write_text("a file of the user's")
    open_run_folder(config_of(tmp_path), Accelerator())
    assert (tmp_path / "out" / "toy-1").read_text() == "a file of the user's"
    assert (tmp_path / "out" / "toy-2").is_dir()


@pytest.mark.parametrize("where", ["file/toy", "file/deeper/toy"])
def test_a_folder_that_cannot_be_written_is_told_with_its_key(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("in the way")
    config = config_of(tmp_path)
    config.output_dir = str(tmp_path / where)
    with pytest.raises(ConfigError, match=r"output_dir is .*cannot be"):
        open_run_folder(config, Accelerator())
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_current_folder_is_told_to_be_no_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = config_of(tmp_path)
    config.output_dir = "."
    with pytest.raises(ConfigError, match="output_dir"):
        open_run_folder(config, Accelerator())
    assert (tmp_path / "here").is_dir()


def test_the_summary_is_json_for_programs(tmp_path: Path) -> None:
    write_summary(tmp_path, {"reload_error": {"high": 0.001}, "seconds": {"training": 2.0}})
    content = (tmp_path / "summary.json").read_text()
    assert json.loads(content) == {"reload_error": {"high": 0.001}, "seconds": {"training": 2.0}}


def test_the_pair_is_named_for_the_run_and_the_experts(
    tmp_path: Path, home: Path, model: Model, dataset: EncodedDataset
) -> None:
    config = config_of(home, "export.dtype=float32")
    experts, learners = trained(config, model, dataset)
    exporter = Exporter(config, model, dataset)
    files = exporter.write(tmp_path, "toy", experts, learners, LOSSES, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "toy_high_noise.safetensors", "toy_low_noise.safetensors",
    ]  # fmt: skip
    for expert, file in files.items():
        assert file.path.name == f"toy_{expert}_noise.safetensors"
        state, rank, _ = read_adapter(file.path)
        assert rank == 2
        own = adapter_state(experts[expert])
        for name, tensor in state.items():
            scale = 1.5 if "lora_B" in name else 1.0  # alpha / rank
            assert torch.equal(tensor, own[name] * scale)


def test_files_say_what_they_were_trained_from(
    tmp_path: Path, home: Path, model: Model, dataset: EncodedDataset
) -> None:
    config = config_of(
        home, "data.trigger=zorbi", "export.author=Ada", "low.learning_rate=0.5", "seed=3"
    )
    experts, learners = trained(config, model, dataset)
    exporter = Exporter(config, model, dataset)
    files = exporter.write(tmp_path, "toy", experts, learners, LOSSES, {})
    high, low = (metadata(files[expert].path) for expert in EXPERTS)
    assert high["ss_steps"] == "5"
    assert low["ss_steps"] == "6"
    assert float(low["ss_learning_rate"]) == 0.5
    assert high["modelspec.author"] == "Ada"
    sources: list[tuple[dict[str, str], Expert]] = [(high, "high"), (low, "low")]
    for entries, expert in sources:
        text = "\n".join(entries.values())
        assert "zorbi" in text
        assert dataset.fingerprint() in text
        assert component_hash(model, expert) in text
    pair_id = next(name for name in high if name.endswith("pair_id"))
    assert high[pair_id] == low[pair_id] != ""
    loss = next(name for name in high if name.endswith("heldout_loss"))
    assert float(high[loss]) == 0.5
    assert not low.get(loss)  # it was not measured


def test_dates_are_iso_with_a_time_zone(
    tmp_path: Path, home: Path, model: Model, dataset: EncodedDataset
) -> None:
    config = config_of(home)
    exporter = Exporter(config, model, dataset)
    files = exporter.write(tmp_path, "toy", *trained(config, model, dataset), [], {})
    date = datetime.fromisoformat(metadata(files["low"].path)["modelspec.date"])
    assert date.tzinfo is not None
    assert date.microsecond == 0


def test_one_trained_expert_gives_one_file(
    tmp_path: Path, home: Path, model: Model, dataset: EncodedDataset
) -> None:
    config = config_of(home, "experts=[low]")
    exporter = Exporter(config, model, dataset)
    files = exporter.write(tmp_path, "toy", *trained(config, model, dataset), [], {})
    assert list(files) == ["low"]
    assert [path.name for path in tmp_path.iterdir()] == ["toy_low_noise.safetensors"]


@pytest.mark.parametrize("name", ["my_checkpoint", "Optimizer2", "scheduler"])
def test_a_name_that_cannot_be_exported_is_told_before_training(
    home: Path, toy_model: Path, name: str
) -> None:
    # export_adapter refuses it, after all the training
    with pytest.raises(ValueError, match=rf"name.*{name}"):
        check(config_of(home, f"name={name}", f"model.path={toy_model}"), CPU, toy_runs.silent)
