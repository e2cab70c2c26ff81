"""One load: weights go from a checkpoint into operators and parameters, one at a time, and are then proven.

The loader of transformers walks the checkpoint and calls back (see `quantizer`). It swallows exceptions raised inside a
conversion and goes on through the whole checkpoint, so nothing here raises there: a failed conversion returns a mapping
whose `items()` raises, which the loader calls outside its net.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from numagraft import crossings, preflight
from numagraft.checkpoints import Checkpoint, LazyTensor
from numagraft.checkpoints.files import large_tensor
from numagraft.checkpoints.safetensors import SafetensorsCheckpoint
from numagraft.errors import NumagraftError, Problem, UnsupportedOperationError, WeightError
from numagraft.guards import guard
from numagraft.injection import Grafts, inject, make_operators, swap
from numagraft.progress import Meter, Progress
from numagraft.report import PlacedWeight, PlacementReport, build_report
from numagraft.tied import doubled_elements, pack_tied, tied_names, untie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from numagraft.contract import Operator
    from numagraft.native import Runtime
    from numagraft.planning import Plan
    from numagraft.platform import Platform
    from numagraft.runtime import RuntimeLayout

_SHOWN = 8
#: bytes that the kernel is told of before they are read
_READ_AHEAD = 64 << 20
#: bytes of experts that are packed by one call
_TOGETHER = 32 << 20
#: dtypes that operators take; anything wider is rounded to float32 first
_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class Failed(dict):
    """What a failed conversion returns: empty for whoever asks for keys, the error for whoever asks for items."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def items(self) -> NoReturn:
        raise self.error


def failed(error: Exception, name: str) -> Failed:
    if not isinstance(error, NumagraftError):
        error = WeightError(f"{name} cannot be loaded ({type(error).__name__}: {error})")
    return Failed(error)


class Staging:
    """One buffer that tensors on their way into packed memory pass through: warm pages, and no second allocation."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor in the buffer; it overwrites the one taken before."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._bytes = large_tensor((size,), torch.uint8)
        return self._bytes[:size].view(dtype).view(tuple(shape))


def ahead(steps: Sequence[Callable[[], int]]) -> Iterator[int]:
    """Indices of `steps` in order; each step is called early, so that about 64 MiB are on their way before their turn.

    A step tells the kernel what will be read and returns its bytes: the disk then works while weights are packed.
    """
    told: list[int] = []
    on_the_way = 0
    for index in range(len(steps)):
        while len(told) < len(steps) and (on_the_way < _READ_AHEAD or len(told) <= index):
            told.append(steps[len(told)]())
            on_the_way += told[-1]
        yield index
        on_the_way -= told[index]


class Load:
    """The state of one load of one model.

    `checkpoint` is None where transformers reads the files itself; `files` are then only checked.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        checkpoint: Checkpoint | None = None,
        files: Sequence[Path] = (),
        progress: Progress | None = None,
        allow_unexpected: Sequence[str] = (),
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.files = list(files)
        self.allow_unexpected = tuple(allow_unexpected)
        self.meter = Meter(progress, checkpoint.source_bytes if checkpoint is not None else 0)
        self.grafts = Grafts({}, {}, {})
        self.runtime: Runtime | None = None
        self.residue_bytes: int | None = None
        self._tied: frozenset[str] = frozenset()
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._many_targets: tuple[str, ...] = ()
        self._devices = crossings.devices_by_module(plan)
        self._staging = Staging()
        self._dtype = torch.float32

    def graft(self, model: PreTrainedModel) -> None:
        """Puts the planned operators into a skeleton; nothing is allocated yet."""
        self._dtype = getattr(model.config, "dtype", None) or torch.float32
        widen(model, self._dtype)
        self._expected = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
        self._tied = tied_names(model)
        self.runtime = make_runtime(self.plan)
        self.grafts = make_operators(model, self.plan, self.runtime)
        inject(model, self.grafts)

    def conversions(self, conversions: Iterable[WeightTransform], model: PreTrainedModel) -> list[WeightTransform]:
        """The loader's conversions, with those that feed us replaced by ones that read tensor by tensor.

        Where we hold the checkpoint, its names and shapes are checked against the model first (CheckpointError).
        """
        conversions = list(conversions)
        if self.checkpoint is not None:
            self.checkpoint.defer()
            preflight.check(self.checkpoint, conversions, model, allow_unexpected=self.allow_unexpected)
        elif self.files and all(path.suffix == ".safetensors" for path in self.files):
            # transformers itself only warns about tensors without a place; where it reads the files, that stands
            with SafetensorsCheckpoint.of_files(str(self.files[0].parent), model.config, self.files) as checkpoint:
                preflight.check(checkpoint, conversions, model, refuse_unexpected=False)
        self._many_targets = tuple(
            pattern
            for each in conversions
            if isinstance(each, WeightConverter) and len(each.target_patterns) > 1
            for pattern in each.target_patterns
        )
        return [
            each.copy(
                list(each._original_source_patterns),
                list(each._original_target_patterns),
                operations=[Stream(self, each.operations, one_by_one=preflight.merges_experts(each))],
            )
            if isinstance(each, WeightConverter)
            else each
            for each in conversions
        ]

    def intercepts(self, name: str) -> bool:
        """Whether the loader hands us the values of this parameter instead of setting them itself."""
        if self.checkpoint is not None:
            return True
        return (
            self.packs(name)
            or crossings.device_of(name, self._devices).type != crossings.MAIN_DEVICE
            or any(pattern in name for pattern in self._many_targets)
        )

    def packs(self, name: str) -> bool:
        """Whether an operator takes this parameter as it streams by; tied ones are packed at the end."""
        return name in self.grafts.owners and name not in self._tied

    def take(self, values: Mapping[str, Any], missing_keys: set[str] | None) -> dict[str, torch.Tensor]:
        """Hands grafted values to their operators and returns the others, read, cast and on their device."""
        ordinary: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            tensor = value[0] if isinstance(value, list) else value
            shape = self._expected[name][0]
            if tensor.shape != shape:
                raise WeightError(
                    f"{name} has the shape {list(tensor.shape)} in the checkpoint, but the model needs {list(shape)}: "
                    "the weights and the configuration are of different models; check that both come from the same place"
                )
            if self.packs(name):
                self._pack(name, tensor)
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                ordinary[name] = self._keep(name, tensor)
        return ordinary

    def take_experts(self, name: str, experts: Iterable[Sequence[Any]], missing_keys: set[str] | None) -> None:
        """Hands a parameter over expert by expert; each expert comes as tensors to be joined along their rows."""
        _, local = self.grafts.owners[name]
        operator = self.grafts.operators[self.grafts.owners[name][0]]
        shape = self._expected[name][0]
        count = 0
        experts = list(experts)
        lazy = all(isinstance(tensor, LazyTensor) for tensors in experts for tensor in tensors)
        if lazy and len(experts) == shape[0]:
            stretches = [[Stretch(tensor) for tensor in tensors] for tensors in experts]
            if self._pack_stored(operator, local, stretches):
                if missing_keys is not None:
                    missing_keys.discard(name)
                return
        steps = [partial(_prefetch, tensors) for tensors in experts]
        for count, tensors in ((index + 1, experts[index]) for index in ahead(steps)):
            rows = sum(tensor.shape[0] for tensor in tensors)
            found = (rows, *tensors[0].shape[1:])
            if found != tuple(shape[1:]) or count > shape[0]:
                raise WeightError(
                    f"{name}: expert {count - 1} has the shape {list(found)} in the checkpoint, but the model has "
                    f"{shape[0]} experts of {list(shape[1:])}: check that weights and configuration are of the same model"
                )
            joined = self._buffer(name, found, tensors[0].dtype)
            begin = 0
            for tensor in tensors:
                part = joined[begin : begin + tensor.shape[0]]
                begin += tensor.shape[0]
                if isinstance(tensor, LazyTensor):
                    tensor.read(part)
                    self.meter.add(tensor.source_bytes, tensor.name)
                else:
                    part.copy_(tensor)
            operator.load(local, self._packable(name, joined), expert=count - 1)
        if count != shape[0]:
            raise WeightError(f"{name}: the checkpoint holds {count} experts, but the model has {shape[0]}")
        if missing_keys is not None:
            missing_keys.discard(name)

    def _pack_stored(self, operator: Operator, local: str, experts: Sequence[Sequence[Stretch]]) -> bool:
        """Lets the operator read experts (or, as a single one, a matrix) out of the file itself, many at once.

        Returns False, with nothing done, where it cannot.
        """
        sizes = [sum(stretch.bytes for stretch in parts) for parts in experts]
        groups = gathered(sizes)
        steps = [partial(_prefetch_stretches, experts[begin:end]) for begin, end in groups]
        for index in ahead(steps):
            begin, end = groups[index]
            stored = [[stretch.tensor.stored(stretch.index) for stretch in parts] for parts in experts[begin:end]]
            first = None if experts[0][0].whole else begin
            if any(None in parts for parts in stored) or not operator.load_stored(local, stored, first_expert=first):
                if begin == 0:
                    return False
                raise WeightError(f"{operator.name}.{local}: expert {begin} lies otherwise in the checkpoint than others")
            for stretch in (each for parts in experts[begin:end] for each in parts):
                stretch.tensor.was_read(stretch.index)
                self.meter.add(stretch.bytes, stretch.tensor.name)
        return True

    def _pack(self, name: str, tensor: LazyTensor | torch.Tensor) -> None:
        module, local = self.grafts.owners[name]
        operator = self.grafts.operators[module]
        if isinstance(tensor, LazyTensor) and len(tensor.shape) in (2, 3):
            indices = [None] if len(tensor.shape) == 2 else range(tensor.shape[0])
            whole = len(tensor.shape) == 2
            if self._pack_stored(operator, local, [[Stretch(tensor, index, whole)] for index in indices]):
                return
        if len(tensor.shape) != 3:
            if isinstance(tensor, LazyTensor):
                source = tensor
                tensor = source.read(self._buffer(name, source.shape, source.dtype))
                operator.load(local, self._packable(name, tensor))
                self.meter.add(source.source_bytes, name)
            else:
                operator.load(local, self._packable(name, tensor))
            return
        steps = [partial(_prefetch, [tensor], expert) for expert in range(tensor.shape[0])]
        for expert in ahead(steps):
            if isinstance(tensor, LazyTensor):
                part = tensor.read_part(expert, self._buffer(name, tensor.shape[1:], tensor.dtype))
                self.meter.add(tensor.source_bytes // tensor.shape[0], name)
            else:
                part = tensor[expert]
            operator.load(local, self._packable(name, part), expert=expert)

    def _keep(self, name: str, tensor: LazyTensor | torch.Tensor) -> torch.Tensor:
        expected = self._expected[name][1]
        dtype = expected
        if isinstance(tensor, LazyTensor):
            # the loader asks for another dtype than the model's only for modules that must stay in float32
            if tensor.requested not in (None, self._dtype) and expected.is_floating_point:
                dtype = tensor.requested
            self.meter.add(tensor.source_bytes, tensor.name)
            tensor = tensor.read()
        elif tensor.dtype != expected and tensor.dtype != self._dtype:
            dtype = tensor.dtype
        return tensor.to(device=crossings.device_of(name, self._devices), dtype=dtype)

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Staging for operators that pack at once; fresh memory for those that may keep the tensor itself."""
        if self.grafts.planned[self.grafts.owners[name][0]].placement is None:
            return torch.empty(tuple(shape), dtype=dtype)
        return self._staging.take(shape, dtype)

    def _packable(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        planned = self.grafts.planned[self.grafts.owners[name][0]]
        if planned.placement is None:
            return tensor.to(self._expected[name][1])
        return tensor if tensor.dtype in _PACKABLE else tensor.to(torch.float32)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Packs tied weights, refuses what is incomplete, proves the placement, and makes the model safe to use.

        Raises WeightError for anything that never came, PlacementError where strict and the proof fails.
        """
        doubled = doubled_elements(model, self.grafts)
        pack_tied(model, self.grafts)
        refuse_incomplete(self.grafts)
        for operator in self.grafts.operators.values():
            operator.finish()
        if self.checkpoint is not None:
            self.checkpoint.drop_pages()
            self.residue_bytes = self.checkpoint.page_cache_residue()
        return self._seal(model, doubled)

    def graft_in_memory(self, model: PreTrainedModel, skeleton: PreTrainedModel) -> PreTrainedModel:
        """Packs the weights of a model in memory, module by module; each original goes once it is packed.

        `skeleton` is the same model on the meta device. A failure leaves a model that refuses to run.
        """
        self._expected = {name: (value.shape, value.dtype) for name, value in skeleton.state_dict().items()}
        self.runtime = make_runtime(self.plan)
        self.grafts = make_operators(skeleton, self.plan, self.runtime)
        doubled = doubled_elements(skeleton, self.grafts)
        self.meter.total_bytes = sum(
            shape.numel() * dtype.itemsize
            for name, (shape, dtype) in self._expected.items()
            if name in self.grafts.owners
        )
        try:
            for name, operator in self.grafts.operators.items():
                self._pack_module(name, model.get_submodule(name))
                swap(model, name, operator)
                operator.finish()
            refuse_incomplete(self.grafts)
            move_parameters(model, self._devices)
            return self._seal(model.eval(), doubled)
        except BaseException:
            model.forward = _unusable
            raise

    def _pack_module(self, name: str, module: nn.Module) -> None:
        operator = self.grafts.operators[name]
        for local, tensor in module.state_dict().items():
            self._pack(f"{name}.{local}", tensor)
            self.meter.add(tensor.nbytes, f"{name}.{local}")
        # buffers outside the state (tables a module computes itself) go over as they are
        for local, buffer in module.named_buffers():
            owner, _, leaf = local.rpartition(".")
            if f"{name}.{local}" not in self.grafts.owners and local in dict(operator.named_buffers()):
                operator.get_submodule(owner)._buffers[leaf] = buffer

    def _seal(self, model: PreTrainedModel, doubled: Mapping[str, int]) -> PreTrainedModel:
        untie(model, self.grafts)
        move_buffers(model, self._devices)
        crossings.add_crossings(model, self.plan)
        refuse_meta(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        report = make_reporter(self.plan, self.grafts, self.runtime, self.residue_bytes)
        if self.plan.layout.strict:
            report().require()
        model.numagraft_plan = self.plan
        model.placement_report = report
        guard(model, self.grafts.operators, doubled)
        self.release()
        return model

    def release(self) -> None:
        """Lets go of everything that only loading needed."""
        self.checkpoint = None
        self._staging = Staging()
        self._expected = {}
        self.grafts = Grafts({}, {}, {})


def widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives placeholders that the family keeps in float32 (a router's correction bias) that dtype.

    The loader of transformers does so where it sets a parameter itself; operators go by their placeholders.
    """
    plan = model._get_dtype_plan(dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = next(
            (wide for pattern, wide in plan.items() if re.search(pattern.replace("*", ".*"), name)), tensor.dtype
        )
        if tensor.is_floating_point() and tensor.dtype != wanted:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            placeholder = torch.empty(tensor.shape, dtype=wanted, device=tensor.device)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(placeholder, requires_grad=tensor.requires_grad)
            else:
                owner._buffers[leaf] = placeholder


def gathered(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [begin, end) of neighbours that are about 32 MiB together, in order.

    >>> gathered([20 << 20, 20 << 20, 40 << 20, 1])
    [(0, 2), (2, 3), (3, 4)]
    """
    ranges: list[tuple[int, int]] = []
    begin, together = 0, 0
    for index, size in enumerate(sizes):
        together += size
        if together >= _TOGETHER or index + 1 == len(sizes):
            ranges.append((begin, index + 1))
            begin, together = index + 1, 0
    return ranges


@dataclass(frozen=True)
class Stretch:
    """A tensor, or what it holds at one index of its first dimension; `whole`: the parameter has no experts."""

    tensor: LazyTensor
    index: int | None = None
    whole: bool = False

    @property
    def bytes(self) -> int:
        return self.tensor.source_bytes // (1 if self.index is None else self.tensor.shape[0])


def _prefetch_stretches(experts: Sequence[Sequence[Stretch]]) -> int:
    # the kernel reads on by itself in what is larger than all that it is told of
    stretches = [stretch for parts in experts for stretch in parts]
    return sum(each.tensor.prefetch(each.index) for each in stretches if each.bytes <= _READ_AHEAD)


def _prefetch(tensors: Sequence[Any], index: int | None = None) -> int:
    return sum(tensor.prefetch(index) for tensor in tensors if isinstance(tensor, LazyTensor))


class Take(ConversionOps):
    """The last step of every conversion we intercept: values to operators, the rest back to the loader."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def __deepcopy__(self, memo: dict[int, Any]) -> Take:
        return self  # the loader copies converters; the load they belong to stays one

    def convert(self, input_dict: Any, *args: Any, missing_keys: set[str] | None = None, **kwargs: Any) -> Any:
        if isinstance(input_dict, Failed):
            return input_dict
        try:
            return self._load.take(input_dict, missing_keys)
        except Exception as error:
            return failed(error, kwargs.get("full_layer_name") or ", ".join(input_dict))


class Stream(ConversionOps):
    """A converter's operations as one: reads what they need, or hands experts over one by one where they only merge."""

    def __init__(self, load: Load, operations: Sequence[ConversionOps], *, one_by_one: bool) -> None:
        self._load = load
        self._operations = list(operations)
        self._one_by_one = one_by_one
        self.supports_many_to_many = any(operation.supports_many_to_many for operation in operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        try:
            if self._one_by_one and self._load.packs(full_layer_name):
                lists = [input_dict.pop(pattern, []) for pattern in source_patterns]
                lengths = {len(each) for each in lists}
                if len(lengths) != 1:
                    counts = ", ".join(f"{len(each)} of {p!r}" for each, p in zip(lists, source_patterns, strict=True))
                    raise WeightError(
                        f"{full_layer_name}: the checkpoint holds {counts}, but as many of each are needed"
                    )
                self._load.take_experts(full_layer_name, zip(*lists, strict=True), missing_keys)
                return {}
            values: Any = {pattern: self._read(tensors) for pattern, tensors in input_dict.items()}
            input_dict.clear()
            for operation in self._operations:
                values = operation.convert(
                    values,
                    source_patterns=source_patterns,
                    target_patterns=target_patterns,
                    full_layer_name=full_layer_name,
                    missing_keys=missing_keys,
                    **kwargs,
                )
            return values
        except Exception as error:
            return failed(error, full_layer_name)

    def _read(self, tensors: list[Any]) -> list[Any]:
        read = []
        for tensor in tensors:
            if isinstance(tensor, LazyTensor):
                self._load.meter.add(tensor.source_bytes, tensor.name)
                tensor = tensor.read()
            read.append(tensor)
        return read


def plan_model(
    skeleton: PreTrainedModel,
    rules: Any,
    *,
    saved: Plan | None = None,
    overrides: Sequence[str] = (),
    platform: Platform | None = None,
    runtime: RuntimeLayout | None = None,
    trust_code: bool = False,
    check_fit: bool = True,
) -> Plan:
    """What `rules` do to a model on the meta device, on this machine (or on `platform`); or the plan `saved`, as it is.

    Raises RuleError or PlanError with every problem.
    """
    from numagraft.platform import Platform

    platform = platform if platform is not None else Platform.detect()
    if saved is not None:
        from numagraft.plans.verification import fit_to

        return fit_to(saved, skeleton, platform, layout=runtime)
    from numagraft.planning import make_plan
    from numagraft.rulefile import load_rules

    ruleset = load_rules(rules, overrides=overrides, trust_code=trust_code, platform=platform, config=skeleton.config)
    return make_plan(skeleton, ruleset, platform, layout=runtime, check_fit=check_fit)


def make_runtime(plan: Plan) -> Runtime | None:
    """The threads and arenas of a plan; None when it places nothing."""
    if not any(each.placement is not None for each in plan.modules):
        return None
    from numagraft.native import Runtime

    return Runtime(plan.layout)


def refuse_incomplete(grafts: Grafts) -> None:
    """Raises WeightError naming every grafted weight that never came."""
    missing = [f"{module}.{name}" for module, operator in grafts.operators.items() for name in operator.missing()]
    if missing:
        raise WeightError(
            f"{len(missing)} grafted weights never came: the checkpoint is incomplete, or names them differently; check that "
            "it belongs to this model",
            [Problem(name, "never came") for name in missing[:_SHOWN]],
        )


def refuse_meta(model: nn.Module) -> None:
    """Raises WeightError naming every tensor without memory: torch would compute garbage from it, without an error."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise WeightError(
            f"{len(empty)} tensors of the model were left without values (on the meta device): the checkpoint is incomplete, "
            "or an operator forgot to delete a placeholder",
            [Problem(name, "is on the meta device") for name in empty[:_SHOWN]],
        )


def _unusable(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedOperationError(
        "grafting this model failed half way, and weights that were packed by then are gone from it: load the model again"
    )


def move_parameters(model: nn.Module, devices: dict[str, torch.device]) -> None:
    """Puts the parameters of kept modules where rules send them."""
    for name, parameter in model.named_parameters():
        device = crossings.device_of(name, devices)
        if parameter.device != device:
            parameter.data = parameter.data.to(device)


def move_buffers(model: nn.Module, devices: dict[str, torch.device]) -> None:
    """Puts buffers where the module they belong to lives; the loader makes them on the main device."""
    for name, module in model.named_modules():
        device = crossings.device_of(name, devices)
        for local, buffer in module.named_buffers(recurse=False):
            if buffer.device != device and buffer.device.type != "meta":
                module._buffers[local] = buffer.to(device)


@dataclass(frozen=True)
class NothingPlaced:
    """Stands for a runtime in the report of a plan that places nothing."""

    layout: RuntimeLayout

    def memory_report(self) -> tuple[()]:
        return ()


def make_reporter(
    plan: Plan, grafts: Grafts, runtime: Runtime | None, residue_bytes: int | None
) -> Callable[[], PlacementReport]:
    """A function that asks the kernel where every packed weight is, at any time."""
    asked = runtime if runtime is not None else NothingPlaced(plan.layout)
    operators, planned = grafts.operators, grafts.planned

    def placement_report() -> PlacementReport:
        """Where the packed weights are now, asked from the kernel."""
        placed = [
            PlacedWeight(
                each.rule_id, name, each.placement, tuple(operators[name].buffers_placed()), planned=each.node_bytes
            )
            for name, each in planned.items()
            if each.placement is not None
        ]
        return build_report(placed, asked, page_cache_residue=residue_bytes, fallbacks=plan.fallbacks)

    return placement_report
