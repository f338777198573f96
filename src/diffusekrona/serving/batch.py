"""krona_batch: other adapters for each image of a pipeline's batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn

from ..errors import BatchError
from ..tuner.batch import Batch
from ..tuner.compat import is_compiled
from ..tuner.components import adaptable_components, named_adapter
from ..tuner.injected import adapters_by_sample
from ..tuner.names import is_denoiser

_LATENTS = "prepare_latents"


@contextmanager
def krona_batch(model: Any, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Let each sample of a batch have its own adapter, or none, in one pass of the base.

    Inside, `pipe(prompts)` draws each prompt with its adapter: with guidance, with several images per prompt, by any
    Diffusers pipeline whose models keep a batch's rows in their order. Which adapters are active makes no difference
    meanwhile. What `torch.compile` has compiled is not compiled anew for other adapters of the same shapes, and no
    gradients flow there. Elsewhere they do; with gradient checkpointing, call `backward` inside as well.

    Args:
        model: a pipeline, or a module that is called with one row for each sample, or with all of them again for each
            pass of guidance.
        adapter_names: an adapter for each prompt, or for each image; None for the base alone.

    Raises:
        AdapterNameError: no KronA adapter has one of the names.
        BatchError: no names; an adapter is merged, or trains whole modules. Inside: a batch of another size.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from diffusekrona import KronAConfig, inject_krona
        >>> model = nn.Sequential(nn.Linear(128, 64))
        >>> for name in ("dog", "cat"):
        ...     _ = inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"], init_weights=False), name)
        >>> with krona_batch(model, ["dog", None, "cat"]):
        ...     y = model(torch.ones(3, 128))
        >>> torch.allclose(y[1], model[0].base_layer(torch.ones(128)), atol=1e-6)
        True
    """
    components = adaptable_components(model)
    names = list(adapter_names)
    if not names or isinstance(adapter_names, str):
        raise BatchError("krona_batch takes a list with an adapter's name, or None, for each sample.")
    for name in dict.fromkeys(name for name in names if name is not None):
        named_adapter(components, name)
    of_pipeline = not isinstance(model, nn.Module)
    batches = {
        part: Batch(names, of_pipeline=of_pipeline, of_texts=not is_denoiser(part) if part else False)
        for part in components
    }
    with ExitStack() as stack:
        for part, component in components.items():
            stack.enter_context(adapters_by_sample(component, batches[part], is_compiled(model, component)))
        if of_pipeline:
            stack.enter_context(_counting_images(model, list(batches.values())))
        yield


@contextmanager
def _counting_images(pipe: Any, batches: Sequence[Batch]) -> Iterator[None]:
    """Tell batches how many images a pipeline draws, which it says when it asks for their latents."""
    prepare = getattr(pipe, _LATENTS, None)
    if prepare is None or "batch_size" not in inspect.signature(prepare).parameters:
        yield
        return
    setattr(pipe, _LATENTS, _counted(prepare, batches))
    try:
        yield
    finally:
        delattr(pipe, _LATENTS)


def _counted(prepare: Callable[..., Any], batches: Sequence[Batch]) -> Callable[..., Any]:
    signature = inspect.signature(prepare)

    @wraps(prepare)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for batch in batches:
            batch.images = given["batch_size"] * (given.get("num_images_per_prompt") or 1)
        return prepare(*args, **kwargs)

    return counted
