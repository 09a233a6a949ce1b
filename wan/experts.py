"""The experts of a Wan 2.2 model: all are loaded, one is on the device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from wan.checkpoints import Model, load_transformer
from wan.lora import without_adapter
from wan.variants import Expert


class Experts(Mapping[Expert, WanTransformer3DModel]):
    """The transformers of a model, by expert; the one asked for is on the device.

    Asking for one of two swaps it with the other on the device, unless both are `resident` there:
    moving 28 GB costs about a second at each turn, and halves the memory that a run needs. Both are
    always loaded, as a preview needs the other expert even when only one is trained.
    """

    def __init__(
        self,
        transformers: dict[Expert, WanTransformer3DModel],
        device: torch.device,
        resident: bool = False,
    ) -> None:
        self._transformers = transformers
        self._resident = resident
        self._device = torch.empty(0, device=device).device  # cuda:0, not cuda

    def __getitem__(self, expert: Expert) -> WanTransformer3DModel:
        wanted = self._transformers[expert]
        if wanted.device != self._device:
            for other in self._transformers.values():
                if other is not wanted and not self._resident:
                    other.to("cpu")  # pyright: ignore[reportArgumentType] (hidden by a decorator)
            wanted.to(self._device)  # pyright: ignore[reportArgumentType] (the same)
        return wanted

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._transformers)

    def __len__(self) -> int:
        return len(self._transformers)


def load_experts(
    model: Model, dtype: torch.dtype, device: torch.device, resident: bool = False
) -> Experts:
    """All experts of the model, frozen: the first on the device, the other too if `resident`."""
    experts = model.variant.experts
    loaded: dict[Expert, WanTransformer3DModel] = {
        expert: load_transformer(
            model, expert, dtype, device if resident or expert == experts[0] else "cpu"
        )
        for expert in experts
    }
    return Experts(loaded, device, resident)


@contextmanager
def base_only(experts: Experts, adapted: Sequence[Expert]) -> Iterator[None]:
    """Within the block the experts compute what the base model does, adapters set aside."""
    with ExitStack() as stack:
        for expert in adapted:
            stack.enter_context(without_adapter(experts[expert]))
        yield
