"""Programs that read no model start without the libraries that build one."""

import json
import subprocess
import sys

from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf.constants import GGMLQuantizationType

from wan.recognise import GGUF_STORAGES
from wan.speed import BACKENDS
from wan.speed_choices import ATTENTIONS

BUILDERS = ("peft", "diffusers", "transformers", "accelerate", "bitsandbytes", "wandb")
LIGHT = {
    "train.compose": ("torch", *BUILDERS),  # the settings of a run
    "train.errors": BUILDERS,  # around every program
    "train.preview_plan": BUILDERS,
    "tools.download": BUILDERS,
    "tools.report": BUILDERS,
    "tools.lora": BUILDERS,  # all its subcommands, those that read models too
}
PROGRAM = """
import importlib, json, sys
light = json.loads(sys.argv[1])
for module, absent in light.items():
    importlib.import_module(module)
    light[module] = [name for name in absent if name in sys.modules]
print(json.dumps(light))
"""


def test_what_reads_no_model_imports_no_library_that_builds_one() -> None:
    """In one process, the lightest first: the first that brings one is to be mended."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(LIGHT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {module: [] for module in LIGHT}


def test_the_formats_of_gguf_that_are_read_are_those_of_the_library() -> None:
    library = {GGMLQuantizationType(kind).name for kind in dequantize_functions}
    assert library | {"F16", "F32"} == GGUF_STORAGES


def test_every_kernel_of_attention_that_can_be_chosen_is_one_of_the_library() -> None:
    assert tuple(BACKENDS) == ATTENTIONS
