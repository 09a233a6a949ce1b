"""Programs that read no model start without the libraries that build one."""

import subprocess
import sys

import pytest
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf.constants import GGMLQuantizationType

from wan.recognise import GGUF_STORAGES
from wan.speed import BACKENDS
from wan.speed_choices import ATTENTIONS

# Any one of the first three brings the others, and takes longer than all else together.
BUILDERS = ("peft", "diffusers", "transformers", "accelerate", "bitsandbytes", "wandb")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("train.compose", ("torch", *BUILDERS)),  # the settings of a run
        ("train.errors", BUILDERS),  # around every program
        ("tools.lora", BUILDERS),  # all its subcommands, those that read models too
        ("tools.report", BUILDERS),
        ("tools.download", BUILDERS),
        ("train.preview_plan", BUILDERS),
    ],
)
def test_it_imports_no_library_that_builds_models(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_formats_of_gguf_that_are_read_are_those_of_the_library() -> None:
    library = {GGMLQuantizationType(kind).name for kind in dequantize_functions}
    assert library | {"F16", "F32"} == GGUF_STORAGES


def test_every_kernel_of_attention_that_can_be_chosen_is_one_of_the_library() -> None:
    assert tuple(BACKENDS) == ATTENTIONS
