"""Two passes with one run of the trunk, where only the module that makes the model's output moves.

Below that module, the head, both passes compute the same. So the second pass runs the head again on the input that it
had in the first, and its one backward goes through the head and the trunk's graph of the first pass. This is right
only if the loss depends on the model through one call whose output is the head's; everything else is refused with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from samopt._replay.call_watch import RAISED, CallWatcher, is_compiled, watch
from samopt._replay.module_state import every_module
from samopt._replay.outputs import tensors_in
from samopt._replay.random_state import RngState
from samopt._step.ascent import Ascent
from samopt._step.named_parameters import is_norm, named_parameters
from samopt.distributed import data_parallel_modules, is_fully_sharded, runs_on_several_ranks

__all__ = ["TrunkReuse", "graph_nodes", "leaves_of"]


class _Calls(CallWatcher):
    """Notes the outermost calls of some modules: module, arguments, output, and the state at both ends."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self.modules: list[nn.Module] = []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output: Any = None
        self.modes: Any = None
        self.training: list[bool] = []
        self.versions: list[int] = []
        self.random_before: RngState | None = None
        self.random_after: RngState | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how a call begins.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self.modules.append(module)
        self.args, self.kwargs = args, kwargs
        self.modes = _modes(self._devices)
        self.training = [inside.training for inside in every_module([module])]
        self.versions = _versions((args, kwargs))
        self.random_before = RngState.capture(self._devices)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note how it ended.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.
        """
        if output is not RAISED:
            self.output = output
            self.random_after = RngState.capture(self._devices, like=self.random_before)


class TrunkReuse:
    """Runs the first pass of a step as usual, and the second from the head on.

    Args:
        models: The modules of ``model=``.
        ascent: What moves.
    """

    def __init__(self, models: Sequence[nn.Module], ascent: Ascent) -> None:
        self._models = models
        self._ascent = ascent
        self._head: nn.Module | None = None
        self._moving: list[Tensor] = []  # what the head was found for
        self._model_calls = self._head_calls = _Calls(())
        self._buffers: list[tuple[nn.Module, str, Tensor, int]] = []  # of the trunk, with their version counters

    @property
    def trunk_buffers(self) -> list[Tensor]:
        """The buffers of the trunk, whose graph the second backward goes through as the first forward left it."""
        return [buffer for _, _, buffer, _ in self._buffers]

    def first(self, compute_loss: Callable[[], Any]) -> Any:
        """Run the forward of the first pass and note what the second needs.

        Args:
            compute_loss: Returns the loss.

        Returns:
            What it returned.

        Raises:
            RuntimeError: If the trunk cannot be reused.
        """
        head = self._find_head()
        devices = self._ascent.accelerators()
        self._model_calls, self._head_calls = _Calls(devices), _Calls(devices)
        self._note_buffers(head)
        stop_model = watch(self._models, self._model_calls)
        stop_head = watch([head], self._head_calls, only_these=True)
        try:
            result = compute_loss()
        finally:
            stop_head()
            stop_model()
        self._check_calls()
        changed = [(module, name) for module, name in self._changed_buffers() if not is_norm(module)]
        if changed:
            module, name = changed[0]
            _refuse(
                f"the first pass wrote into {name} of {type(module).__name__}, a buffer of the trunk. If its forward "
                "reads it too, as spectral_norm does, another run of the trunk gives another output"
            )
        self._note_buffers(head)
        return result

    def check(self, loss: Tensor, rebound: Sequence[str]) -> None:
        """Raise if something besides the calls tells that the second pass would not be the full one.

        Args:
            loss: The loss of the first pass, with its graph.
            rebound: Attributes of the model that are others than before the first pass.

        Raises:
            RuntimeError: If the trunk cannot be reused.
        """
        if rebound:
            _refuse(f"the first pass changed state of the model that a second forward would change too: {rebound[0]}")
        owned = set(map(id, self._ascent.parameters()))
        foreign = [leaf for leaf in leaves_of([loss]) if id(leaf) not in owned]
        if foreign:
            _refuse(
                f"the loss has a gradient for a tensor of shape {tuple(foreign[0].shape)} that the base does not own"
            )
        moving = set(map(id, self._moving))
        if any(id(leaf) in moving for leaf in leaves_of(tensors_in((self._head_calls.args, self._head_calls.kwargs)))):
            _refuse("the input of the head depends on the parameters that move, so the trunk must be run again")

    def again(self, compute_loss: Callable[[], Any]) -> Any:
        """Run the forward of the second pass: the model's call is answered by the head on its input of the first.

        Args:
            compute_loss: As for ``first``.

        Returns:
            What it returned.

        Raises:
            RuntimeError: If the model is called otherwise than in the first pass.
        """
        called = self._model_calls.modules[0]
        second = _Calls(self._ascent.accelerators())
        own = vars(called)
        before = own.get("forward")
        stop = watch(self._models, second)
        own["forward"] = lambda *args, **kwargs: self._answer(second)
        try:
            result = compute_loss()
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before
            stop()
        if second.modules != [called]:
            _refuse(f"the second pass called {_kinds(second.modules)}, the first {_kinds([called])}")
        return result

    def check_second(self) -> None:
        """Raise if the backward of the second pass was not the full one.

        Raises:
            RuntimeError: If it ran a part of the trunk that keeps state.
        """
        for module, name in self._changed_buffers():
            _refuse(
                f"the backward pass ran a part of the trunk again (gradient checkpointing does), which changed {name} "
                f"of {type(module).__name__}; two full passes keep that change of the first one"
            )

    def forget(self) -> None:
        """Let go of the tensors of the pass."""
        self._model_calls = self._head_calls = _Calls(())
        self._buffers = []

    def _note_buffers(self, head: nn.Module) -> None:
        """Note the buffers outside the head."""
        inside = set(every_module([head]))
        outside = [module for module in every_module(self._models) if module not in inside]
        self._buffers = [
            (module, name, buffer, buffer._version)
            for module in outside
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]

    def _changed_buffers(self) -> list[tuple[nn.Module, str]]:
        """Return the buffers that were written into since they were noted: their modules and names."""
        return [(module, name) for module, name, buffer, version in self._buffers if buffer._version != version]

    def _answer(self, second: _Calls) -> Any:
        """Return the head's output for the input that it had in the first pass."""
        first, head = self._model_calls, self._head_calls
        if second.modules != first.modules:
            _refuse(f"the second pass called {_kinds(second.modules)}, the first {_kinds(first.modules)}")
        if not _same((first.args, first.kwargs), (second.args, second.kwargs)) or first.versions != second.versions:
            _refuse(
                "the model was given another input in the second pass; let compute_loss read one and the same batch"
            )
        if second.modes != first.modes:
            _refuse("autocast or gradients were switched on or off between the passes")
        called = head.modules[0]
        if [module.training for module in every_module([called])] != head.training:
            _refuse("the model has its head in another mode while it calls it, as head.eval() in forward does")
        if _versions((head.args, head.kwargs)) != head.versions:
            _refuse("the input of the head was written into after the head had begun (inplace=True does this)")
        assert head.random_before is not None and first.random_after is not None
        head.random_before.restore()
        output = called(*head.args, **head.kwargs)
        first.random_after.restore()
        return output

    def _find_head(self) -> nn.Module:
        """Return the smallest module that has all parameters that move."""
        every = every_module(self._models)
        if runs_on_several_ranks() or data_parallel_modules(self._models) or is_fully_sharded(every):
            _refuse("DDP, sharding and other runs of several processes need their own forward in each pass")
        for module in every:
            if is_compiled(module) or isinstance(module, nn.DataParallel | torch.jit.ScriptModule):
                _refuse(f"{type(module).__name__} hides the calls inside it: it is compiled, or runs copies")
        moving = self._ascent.perturbed_parameters()
        if self._head in every and list(map(id, moving)) == list(map(id, self._moving)):
            assert self._head is not None
            return self._head
        ids = set(map(id, moving))
        holders = [module for module in every if ids.issubset(map(id, module.parameters()))]
        sizes = [sum(1 for _ in module.modules()) for module in holders]
        head = holders[sizes.index(min(sizes))] if holders else None
        if head is None or head in self._models:
            _refuse("the parameters that move lie in no module inside the model that has all of them")
        inside = set(every_module([head]))
        for name, parameter, owner in named_parameters(self._models):
            if id(parameter) in ids and owner not in inside:
                _refuse(f"a parameter that moves is also used outside the head, as {name}")
        self._head, self._moving = head, moving
        return head

    def _check_calls(self) -> None:
        """Raise unless the loss depends on the model through one call, whose output is the head's."""
        model, head = self._model_calls, self._head_calls
        if len(model.modules) != 1:
            _refuse(f"compute_loss made {len(model.modules)} calls of the model ({_kinds(model.modules)}), not one")
        called = model.modules[0]
        if len(head.modules) != 1 or called is head.modules[0] or self._head not in every_module([called]):
            _refuse(f"{type(self._head).__name__}, which moves, was called {len(head.modules)} times inside the model")
        if not isinstance(model.output, Tensor) or model.output is not head.output:
            kind = type(model.output).__name__
            _refuse(f"what {type(called).__name__} returns, a {kind}, is not the output of {type(self._head).__name__}")
        if model.modes != head.modes:
            _refuse("the model switches autocast or gradients on or off before the head")


def leaves_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaf tensors that some tensors depend on.

    Args:
        tensors: Tensors, with their graphs.
    """
    tensors = list(tensors)
    found = [tensor for tensor in tensors if tensor.grad_fn is None and tensor.requires_grad]
    return found + [node.variable for node in graph_nodes(tensors) if type(node).__name__ == "AccumulateGrad"]


def graph_nodes(tensors: Iterable[Tensor], stops: Collection[Any] = ()) -> list[Any]:
    """Return every node of the graphs of some tensors, once.

    Args:
        tensors: Tensors, with their graphs.
        stops: Nodes that are neither returned nor passed.
    """
    seen: set[Any] = {None, *stops}
    nodes, pending = list[Any](), list[Any]({tensor.grad_fn for tensor in tensors} - seen)
    seen.update(pending)
    while pending:  # each step walks the graph, so this loop is kept short
        node = pending.pop()
        nodes.append(node)
        for after, _ in node.next_functions:
            if after not in seen:
                seen.add(after)
                pending.append(after)
    return nodes


def _refuse(reason: str) -> NoReturn:
    raise RuntimeError(
        f"reuse_trunk=True cannot be used here: {reason}. Nothing was updated. Leave reuse_trunk out: two full passes "
        "give the same result"
    )


def _modes(accelerators: Sequence[torch.device]) -> Any:
    """Return what decides how operations run: gradients, and autocast of each kind of device."""
    kinds = sorted({"cpu", *(device.type for device in accelerators)})
    cast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast


def _versions(values: Any) -> list[int]:
    """Return the version counters of the tensors in some values."""
    return [tensor._version for tensor in tensors_in(values) if not tensor.is_inference()]


def _same(values: Any, others: Any) -> bool:
    """Return whether the tensors in some values are those in others, or equal to them."""
    pairs = list(tensors_in(values)), list(tensors_in(others))
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(a is b or (a.dtype is b.dtype and torch.equal(a, b)) for a, b in zip(*pairs, strict=True))


def _kinds(modules: Sequence[nn.Module]) -> str:
    return ", ".join(type(module).__name__ for module in modules) or "nothing"
