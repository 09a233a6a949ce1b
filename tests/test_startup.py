"""Programs that read no model start without the libraries that build one."""

import subprocess
import sys

import pytest
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf.constants import GGMLQuantizationType

from wan.recognise import GGUF_STORAGES

SLOW = ("peft", "diffusers", "transformers", "accelerate", "bitsandbytes", "wandb")


@pytest.mark.parametrize(
    "module", ["tools.lora_check", "tools.lora_diff", "tools.lora_export", "tools.report_page"]
)
def test_it_imports_no_library_that_builds_models(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {SLOW} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_formats_of_gguf_that_are_read_are_those_of_the_library() -> None:
    library = {GGMLQuantizationType(kind).name for kind in dequantize_functions}
    assert library | {"F16", "F32"} == GGUF_STORAGES
