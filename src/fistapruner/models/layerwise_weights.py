"""Find the weights of a causal language model in its checkpoint, and load one decoder layer at a time.

The architecture is built on the meta device, without weights; decoder layers are read from the checkpoint when they are
needed and freed afterwards. No architecture is listed by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError
from ..runtime.numerics import pass_dtype
from .architecture import build_model, find_decoder_layers, loaded_dtype, refuse_experts
from .experts import separate_experts
from .files.checkpoint import Checkpoint
from .files.low_rank import LowRankAdapter
from .names import checkpoint_names, parameter_names


class LayerwiseWeights:
    """A model whose decoder layers are loaded one by one, for :class:`~.layerwise.LayerwiseModel`.

    Args:
        checkpoint: the model's weights.
        device: device of the passes.
        dtype: precision of the passes; None is the checkpoint's own, or fp32 where the device has no matrix units for
            it (CPUs for fp16, most CPUs for bf16) and would be several times slower.
        trust_remote_code: run the checkpoint's own Python code.

    Attributes:
        low_rank: what is added to the weights of operators as they are loaded; None adds nothing.

    Raises:
        FistaPrunerError: the architecture is not a plain decoder-only language model, or a tensor is missing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype or pass_dtype(checkpoint.dtype, device)
        self.model = build_model(checkpoint, trust_remote_code=trust_remote_code).eval()
        self.config = self.model.config
        self.layers_name, self.layers = find_decoder_layers(self.model)
        experts = separate_experts(self.model, self.layers_name, self.layers, checkpoint)
        refuse_experts(self.model, self.layers_name, self.layers)
        self.low_rank: LowRankAdapter | None = None
        self._open: set[int] = set()  # numbers of loaded decoder layers
        self._sources = checkpoint_names(self.model, checkpoint, experts)
        self._names = {source: name for name, source in self._sources.items()}
        self._parameters = {name for name, _ in self.model.named_parameters()}
        buffers_to(self.model, device)

    def __len__(self) -> int:
        return len(self.layers)

    def source(self, parameter: str) -> str:
        """Return the name in the checkpoint of one of the model's parameters."""
        return self._sources[parameter]

    def full_name(self, index: int, inside: str) -> str:
        """Return the name in the model of what is called ``inside`` in decoder layer ``index``."""
        return f"{self.layers_name}.{index}.{inside}"

    def source_of(self, index: int, inside: str) -> str:
        """Return the name in the checkpoint of a parameter of decoder layer ``index``."""
        return self.source(self.full_name(index, inside))

    @property
    def parameters(self) -> Collection[str]:
        """Return the names in the model of all stored parameters and buffers."""
        return self._sources.keys()

    def sources(self) -> Collection[str]:
        """Return the names in the checkpoint of all of the model's parameters and stored buffers."""
        return self._names.keys()

    @cached_property
    def parameter_names(self) -> set[str]:
        """Name the stored tensors that hold parameters; see :func:`~.names.parameter_names`."""
        return parameter_names(self.model, self._sources, self.checkpoint, self.checkpoint.same)

    def parameter_count(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None, dropped: Collection[str] = ()
    ) -> int:
        """Count the parameters of the model.

        Args:
            shapes: of stored tensors that have other shapes than the checkpoint's, by name.
            dropped: names of stored tensors that are left out.
        """
        names = self.parameter_names.difference(dropped)
        sizes = {entry.name: entry.shape for entry in self.checkpoint.stored} | dict(shapes or {})
        return sum(math.prod(sizes[name]) for name in names)

    def layer_parameters(self, index: int) -> list[str]:
        """Return the names in the model of the parameters of decoder layer ``index``."""
        prefix = f"{self.layers_name}.{index}."
        return [name for name in self._sources if name.startswith(prefix)]

    def layer_sources(self, index: int) -> set[str]:
        """Return the names in the checkpoint of the parameters of decoder layer ``index``."""
        return {self.source(name) for name in self.layer_parameters(index)}

    def pass_bytes(self, names: Iterable[str]) -> int:
        """Count the bytes of tensors, by their names in the checkpoint, in the precision of the passes."""
        return sum(math.prod(self.checkpoint.entry(name).shape) for name in names) * self.dtype.itemsize

    def rounded(self, source: str, tensor: Tensor) -> Tensor:
        """Round ``tensor`` to the narrower of the stored dtype of ``source`` and its dtype in the passes."""
        stored = self.checkpoint.entry(source).dtype
        tensor = tensor.to(stored)
        if stored.itemsize <= self.dtype.itemsize:  # no tensor has fewer bits in passes; training asks often
            return tensor
        loaded = loaded_dtype(self.model, self._names[source], self.dtype)
        return tensor if stored.itemsize <= loaded.itemsize else tensor.to(loaded)

    def result(self, source: str, tensor: Tensor) -> Tensor:
        """Copy ``tensor`` to main memory, :meth:`rounded`."""
        rounded = self.rounded(source, tensor).cpu()
        return rounded.clone() if rounded.data_ptr() == tensor.data_ptr() else rounded

    @contextmanager
    def layer(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Load decoder layer ``index`` for the block, and free its weights afterwards.

        Inside another block that holds the layer nothing is loaded or freed.

        Args:
            index: number of the layer.
            replaced: tensors that replace the checkpoint's, by name in the checkpoint (pruned weights).

        Raises:
            ValueError: ``replaced`` inside another block that holds the layer.
        """
        if index in self._open:
            if replaced:
                raise ValueError(f"layer {index} is loaded with other weights")
            yield self.layers[index]
            return
        names = self.layer_parameters(index)
        try:
            self._load(names, replaced or {})
            self._open.add(index)
            yield self.layers[index]
        finally:
            self._open.discard(index)
            self._free(names)

    @contextmanager
    def embeddings_and_head(self, *, head: bool = True, like: LayerwiseWeights | None = None) -> Iterator[None]:
        """Load everything outside the decoder layers for the block: embeddings, final norm, head.

        What another block around this one holds is neither loaded nor freed.

        Args:
            head: False leaves out the output head.
            like: another model; its loaded tensors of the same name and value are used too, and not loaded twice.
        """
        prefix, tensors = self.layers_name + ".", self.model.state_dict(keep_vars=True)
        output, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        names = [name for name in self._sources if not name.startswith(prefix) and tensors[name].is_meta]
        if output is not None and not head:
            names = [name for name in names if tensors[name] is not output.weight]
        headless = output is not None and output.weight.is_meta
        try:
            self._load(names, {}, like)
            if head and output is not None and output.weight.is_meta:
                output.weight = embedding.weight
            yield
        finally:
            self._free(names)
            if headless and not output.weight.is_meta:
                output.weight = nn.Parameter(output.weight.to("meta"), requires_grad=False)

    @contextmanager
    def resident(self, *, layers: bool = True, like: LayerwiseWeights | None = None) -> Iterator[None]:
        """Keep weights loaded for the block; inside it nothing of them is loaded or freed again.

        Args:
            layers: keep the decoder layers too, and not only embeddings, final norm and head.
            like: see :meth:`embeddings_and_head`.
        """
        with ExitStack() as loaded:
            loaded.enter_context(self.embeddings_and_head(like=like))
            for index in range(len(self) if layers else 0):
                loaded.enter_context(self.layer(index))
            yield

    def _load(self, names: list[str], replaced: Mapping[str, Tensor], like: LayerwiseWeights | None = None) -> None:
        """Load parameters and buffers to the device, in the dtypes of transformers (:func:`.loaded_dtype`).

        See :meth:`embeddings_and_head` for ``like``.
        """
        for name in names:
            source = self._sources[name]
            tensor = replaced[source] if source in replaced else self.checkpoint.read(source)
            if self.low_rank is not None:
                module = self.model.get_submodule(name.rpartition(".")[0])
                tensor = self.low_rank.added(name, tensor, transposed=isinstance(module, Conv1D))
            if tensor.is_floating_point():
                # Weights of operators are checked where they are pruned; here norms and biases, which are small.
                if tensor.ndim == 1 and name in self._parameters and not bool(tensor.isfinite().all()):
                    raise FistaPrunerError(f"{self.checkpoint.folder}: {source} contains NaN or infinite values")
                tensor = tensor.to(loaded_dtype(self.model, name, self.dtype))
            tensor = tensor.to(self.device, non_blocking=True)
            twin = None if like is None else like._held(name)
            same = twin is not None and twin.dtype == tensor.dtype and twin.device == tensor.device
            assign(self.model, name, twin if twin is not None and same and torch.equal(twin, tensor) else tensor)

    def _held(self, name: str) -> Tensor | None:
        """Return a loaded parameter or buffer; None where it is not there or not loaded."""
        parent, _, key = name.rpartition(".")
        try:
            module = self.model.get_submodule(parent)
        except AttributeError:
            return None
        held = module._parameters.get(key) if key in module._parameters else module._buffers.get(key)
        return None if held is None or held.is_meta else held.detach()

    def _free(self, names: list[str]) -> None:
        """Move parameters and buffers to the meta device, in the shapes of the checkpoint."""
        for name in names:
            if (held := self._held(name)) is not None:
                shape = self.checkpoint.entry(self._sources[name]).shape
                assign(self.model, name, held.new_empty(shape, device="meta"))


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of a module by its name; the tensor may have another shape."""
    parent, _, key = name.rpartition(".")
    module = module.get_submodule(parent)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor
    if isinstance(module, Conv1D):
        module.nf = module.weight.shape[1]  # its forward pass makes the output in this shape


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module and of all inside it to a device, but for those on the meta device."""
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[key] = buffer.to(device)
