"""Encode what a run needs ahead of it, on any number of processes that share the work.

python -m tools.cache experiment=demo
accelerate launch tools/cache.py experiment=t2v_character model.path=DIR data.path=DIR
"""

import sys

from accelerate import Accelerator

from train.compose import compose
from train.dataset import check_sides, plan_dataset
from train.encode import encode_dataset, model_paths
from train.errors import clear_errors
from train.preview_plan import plan_previews
from train.report import cache_use, clips_lines
from train.tracking import progress_bar
from wan.checkpoints import find_model
from wan.variants import VARIANTS


def main() -> None:
    """Plan as training does, encode what is missing, and say what was done and why."""
    config = compose(sys.argv[1:])
    config.data.encode = True  # false sends here, with all its settings
    facts = VARIANTS[config.model.variant]
    accelerator = Accelerator()
    speaks = accelerator.is_main_process
    model = find_model(model_paths(config.model), facts.name)
    with accelerator.main_process_first():  # the others find what it has read in the cache
        clips = plan_dataset(config.data, facts, progress_bar(speaks))
    check_sides(clips, config.data)
    if speaks:
        print(clips_lines(clips))
    dataset = encode_dataset(
        clips,
        plan_previews(config.preview, facts, config.batch_size).texts,
        config,
        model,
        accelerator.device,
        progress_bar(speaks),
        print,
    )
    if speaks:
        print(cache_use(config, dataset))


if __name__ == "__main__":
    with clear_errors():
        main()
