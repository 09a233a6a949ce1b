"""Asked to stop: by signals and by the clock, at once where nothing is lost, else after a step."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.resumable_runs import (
    SHORT,
    assert_same_run,
    config_of,
    figures,
    last_state,
    left_after,
    make_data,
    run,
    same_tensors,
)
from train.checkpoint import checkpoints_in, step_of
from train.stopping import Stopped, StopRequest, resume_command, stop_requests

ROOT = Path(__file__).parent.parent
OFTEN = ["steps=2", "eval.every=1", "eval.draws=9", "checkpoint.every=0", "preview.prompts=[]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("stopping"))


def when(happened: Callable[[], bool], number: signal.Signals) -> threading.Thread:
    """Send this process a signal as soon as something has happened."""

    def wait() -> None:
        for _ in range(10_000):
            if happened():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def has_line(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_only_interrupts_where_it_may(number: signal.Signals) -> None:
    with stop_requests(None) as stop:
        os.kill(os.getpid(), number)
        assert stop.reason in ("SIGTERM", "Ctrl-C")
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("nothing is begun after a request")
        with stop.interruptible(False):
            pass
    with stop_requests(None) as stop:
        with pytest.raises(Stopped), stop.interruptible():
            os.kill(os.getpid(), number)
        assert not stop.may_interrupt


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with stop_requests(1.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(3600, abs=60)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_time_limit_is_in_hours() -> None:
    with stop_requests(0.05 / 3600) as stop:
        time.sleep(0.2)
        assert stop.reason == "checkpoint.time_limit"


def test_a_second_ctrl_c_ends_the_process_but_not_one_that_a_launcher_repeats() -> None:
    program = (
        "import os, signal, sys, time\n"
        "from train.stopping import stop_requests\n"
        "with stop_requests(None):\n"
        "    for pause in (0, 0, float(sys.argv[1])):\n"
        "        time.sleep(pause); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('alive')\n"
    )
    for pause, code, said in (("0", 0, "alive\n"), ("1.1", -signal.SIGINT, "")):
        done = subprocess.run(
            [sys.executable, "-c", program, pause],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, said), done.stderr


def test_the_end_of_accelerate_launch_is_a_request_too(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from train.stopping import stop_requests\n"
        "with stop_requests(None) as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.reason: time.sleep(0.01)\n"
        "    print(stop.reason, flush=True)\n"
    )
    launcher = tmp_path / "accelerate_launcher"  # no .py: the child imports the real one
    launcher.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(child)!r}], check=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(launcher)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "SIGTERM\n"
    assert process.wait() == -signal.SIGTERM


def test_requests_are_not_taken_outside_the_main_thread() -> None:
    found: list[StopRequest] = []

    def work() -> None:
        with stop_requests(1.0) as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].reason is None


def test_the_command_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train/lora.py", "experiment=demo", "preview.prompts=[a b]"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert resume_command(1) == "python train/lora.py experiment=demo 'preview.prompts=[a b]'"
    assert resume_command(2).startswith("accelerate launch --num_processes 2 train/lora.py ")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resume_command(1).startswith("accelerate launch train/lora.py ")


def test_a_stop_during_an_evaluation_saves_the_step_and_measures_it_later(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(config_of(home, toy_model, "eval", *OFTEN))
    config = config_of(home, toy_model, "eval_stopped", *OFTEN, "tracking.log_every=1")
    folder = Path(config.output_dir)
    # The figures of step 3 are written before it is measured.
    thread = when(lambda: has_line(folder / "metrics.jsonl", '{"step": 3'), signal.SIGTERM)
    run(config)
    thread.join()
    said = capsys.readouterr().out
    assert "stopped    SIGTERM. To go on:" in said
    (saved,) = checkpoints_in(folder / "checkpoints")
    assert step_of(saved) == 3
    assert [line for line in figures(folder) if line["step"] == 3 and "heldout" in str(line)] == []
    run(config)
    assert same_tensors(last_state(folder), last_state(whole))
    heldout = [[x for x in figures(f) if "heldout/low/loss" in x] for f in (folder, whole)]
    assert heldout[0] == heldout[1]


def test_a_stop_during_a_step_finishes_it(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mid-accumulation: 20 passes of a step, and the signal comes within them."""
    long = ["accumulate=20", "steps=2", "turn_steps=2", "eval.every=0", "preview.prompts=[]"]
    config = config_of(home, toy_model, "long", *long, "tracking.log_every=1")
    folder = Path(config.output_dir)
    thread = when(lambda: has_line(folder / "metrics.jsonl", '{"step": 1'), signal.SIGINT)
    run(config)
    thread.join()
    assert "stopped    Ctrl-C. To go on:" in capsys.readouterr().out
    stopped_at = step_of(checkpoints_in(folder / "checkpoints")[-1])
    assert stopped_at in (1, 2)
    run(config)
    whole = run(config_of(home, toy_model, "long_whole", *long, "tracking.log_every=1"))
    assert_same_run(folder, whole)


def test_a_stop_before_the_first_step_leaves_nothing_in_the_way(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(home, toy_model, "early", "eval.draws=20", "steps=1", "optim.warmup_steps=0")
    folder = Path(config.output_dir)
    thread = when(lambda: (folder / "config.yaml").exists(), signal.SIGTERM)
    run(config)
    thread.join()
    assert "stopped    SIGTERM" in capsys.readouterr().out
    assert not checkpoints_in(folder / "checkpoints")
    run(config)
    assert not folder.with_name("early-1").exists()
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 2


def test_the_program_ends_well_when_its_time_is_up_and_the_same_command_goes_on(
    home: Path, toy_model: Path
) -> None:
    whole = run(config_of(home, toy_model, "clock_whole"))
    folder = left_after(whole, home / "out" / "clock", 2)
    config = [f"output_dir={folder}", f"model.path={toy_model}", f"data.path={home / 'data'}"]
    command = [
        sys.executable, str(ROOT / "train" / "lora.py"), "name=toy", "model=tiny", *config,
        f"data.cache={home / 'cache'}", "data.height=32", "data.width=48", "data.workers=0",
        "lora.rank=2", *SHORT, f"checkpoint.time_limit={0.01 / 3600}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stopped    checkpoint.time_limit. To go on:\npython " in done.stdout
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 2
    torch.manual_seed(5)
    run(config_of(home, toy_model, "clock"))
    assert_same_run(folder, whole)
