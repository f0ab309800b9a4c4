"""The loss's derivative with respect to the model's outputs in the first pass, used again in the second."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from samopt._callers.cuda_graphs import is_capturing
from samopt._callers.user_warnings import warn_user
from samopt._replay.call_watch import RAISED, PassFollower
from samopt._replay.outputs import describe, floating_tensors, named_logits, tensors_in
from samopt._replay.unobserved import is_observed
from samopt.distributed import local_part

__all__ = ["OutputGradients", "Outputs"]

Outputs: TypeAlias = Callable[[Any], "Tensor | Sequence[Tensor]"]
"""Takes from what a model returned the tensors that the loss is computed from."""

_Node: TypeAlias = Any  # torch.autograd.graph.Node; the classes that torch generates have no types
_Gradients: TypeAlias = tuple[Tensor | None, ...]


_Edge: TypeAlias = tuple[_Node, int]  # where a tensor's gradient enters the graph: a node, and which of its outputs
_Output: TypeAlias = tuple[str, tuple[int, ...], torch.dtype]  # path, shape and dtype, the same in both passes


class _Call:
    """One forward call of the first pass.

    Args:
        number: Its position among the calls of the first pass.
        inputs: The tensors that it was given.
        in_backward: Whether it ran inside a backward pass, as a checkpoint's recomputation does.
        outputs: Its outputs.

    Attributes:
        gradients: What reached the outputs that one node made, by their paths, in the order in which it came.
        repeated: The paths of outputs that the second pass differentiated.
        sums: Sums of the outputs, which tell whether they are others in the second pass; None where that is known.
    """

    def __init__(
        self,
        number: int,
        inputs: tuple[weakref.ref[Tensor], ...],
        in_backward: bool,
        outputs: tuple[_Output, ...],
    ) -> None:
        self.number, self.inputs, self.in_backward, self.outputs = number, inputs, in_backward, outputs
        self.sums: Tensor | None = None
        self.gradients: dict[tuple[str, ...], deque[_Gradients]] = {}
        self.repeated: set[tuple[str, ...]] = set()

    def is_given(self, inputs: tuple[weakref.ref[Tensor], ...]) -> bool:
        """Return whether it was given the very same tensors."""
        given = [reference() for reference in inputs]
        own = [reference() for reference in self.inputs]
        return bool(given) and len(own) == len(given) and all(a is b for a, b in zip(own, given, strict=True))


class OutputGradients(PassFollower):
    """Notes what reaches the model's outputs in the first pass, and puts it in place of what does in the second.

    A hook on the node that made an output sees the gradient of all that the loss took from it, also where the model
    computed the loss itself. A call of the second pass is matched with one of the first whose output had a gradient:
    the one with the same input tensors if there is one, else the next in order. Calls that are never differentiated
    leave nothing behind, so evaluation between two steps belongs to no pass.

    Memory: one copy of the gradient of the outputs of every call, from its backward in the first pass to its backward
    in the second.

    Args:
        may_move: Returns whether this step has a second pass, as far as the host can tell.
        choose: Takes the outputs from what the model returns; None looks for logits, then takes every floating-point
            tensor with a dimension.

    Attributes:
        round: Counts the steps, by which hooks on a graph of an earlier one are known.
    """

    def __init__(self, may_move: Callable[[], bool], choose: Outputs | None) -> None:
        self._may_move = may_move
        self._choose = choose
        self.round = 0
        self._noted: dict[int, _Call] = {}
        self._has_compared = False
        self.clear()

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Put hooks on the outputs of a call.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.

        Raises:
            TypeError: If the outputs cannot be told.
            ValueError: If an output is made from another, or is a parameter.
            RuntimeError: If a call of the second pass returned other outputs than that of the first.
        """
        if output is RAISED or not torch.is_grad_enabled() or not is_observed():
            return
        if not self._may_move():
            return
        name = type(module).__name__
        tensors = self._outputs_of(output, name)
        if not tensors:
            return
        edges = {path: _edge_of(tensor, path, name) for path, tensor in tensors.items()}
        for path, tensor in tensors.items():
            if tensor._base is not None and tensor._base.grad_fn is not None:
                tensor._base.grad_fn.register_prehook(_RefuseWrites(self, tensor, f"{path} of {name}"))
        outputs = tuple((path, tuple(tensor.shape), tensor.dtype) for path, tensor in tensors.items())
        inputs = tuple(weakref.ref(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        in_backward = torch._C._current_graph_task_id() != -1
        if self.replaying:
            self._repeat(name, inputs, in_backward, outputs, edges, tensors)
            return
        self._refuse_dependent(edges, name)
        self._seen[name] = tuple(path for path, _, _ in outputs)
        call = _Call(self._number, inputs, in_backward, outputs)
        if not self._has_compared:
            call.sums = _sums(tensors)
        self._number += 1
        for node, paths in _by_node(edges):
            note = _Note(self, call, node, paths)
            node.register_prehook(note)
            node.metadata[self] = note
            self._notes.append(weakref.ref(note))

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: what was noted belongs to them; a graph that waits may still bring some."""
        if not self.replaying:
            for call in self._noted.values():
                call.gradients.clear()
            self._noted = {}

    def check_first_pass(self) -> None:
        """Raise unless a gradient reached an output.

        Raises:
            RuntimeError: If none did, so that there is no derivative to use again.
        """
        queues = [queue for call in self._noted.values() for queue in call.gradients.values()]
        if any(gradient is not None for queue in queues for gradients in queue for gradient in gradients):
            return
        if not self._seen:
            raise RuntimeError(
                "FunctionalGradient saw no forward call of model= in this first pass, so there is no derivative with "
                "respect to its outputs; pass as model= the module that the loop calls itself, and compile it with "
                "torch.compile(model), not model.compile()"
            )
        name, paths = next(iter(self._seen.items()))
        raise RuntimeError(
            f"no gradient reached {', '.join(paths)} of {name} in this first pass: the loss is not computed from what "
            "FunctionalGradient takes for the outputs. Give outputs=, a callable that takes from what the model "
            "returns the tensors that the loss is computed from. If the model computes its loss inside torch.compile, "
            "or from another tensor than it returns, compute the loss outside the model"
        )

    def check_second_pass(self) -> None:
        """Raise unless everything that was noted was used.

        Raises:
            RuntimeError: If the second pass repeated other calls than those of the first.
        """
        waiting = self._waiting_calls()
        used = len(self._noted) - len(waiting)
        if waiting:
            raise RuntimeError(
                f"the first pass differentiated {len(self._noted)} forward call(s) of the model, and the second pass "
                f"repeated {used}; run the same forward and backward passes in both, and call optimizer.zero_grad() "
                "after a backward whose gradients are thrown away"
            )
        for call in self._noted.values():
            left = [key for key, queue in call.gradients.items() if queue]
            if any(key in call.repeated for key in left):
                raise RuntimeError(
                    f"{', '.join(left[0])} of forward call {call.number + 1} had more backward passes in the first "
                    "pass than in the second (torch.autograd.grad is one, too: to log a gradient, say); call them as "
                    "often, and in the same order, in both"
                )
            if left:
                raise RuntimeError(_no_longer_used(", ".join(path for key in left for path in key), call))
        if self._unchanged and self._has_moved:
            self._has_compared = True
            if all(self._unchanged):
                warn_user(
                    "the loss is linear in what FunctionalGradient takes for the outputs: its derivative at w + "
                    "epsilon is the one at w to the bit, so the step is SAM's. If the model returns log-probabilities "
                    "or losses, let it return its logits, or give outputs="
                )

    def add(self, call: _Call) -> None:
        """Note that a gradient reached a call of the first pass.

        Args:
            call: The call.
        """
        self._noted[call.number] = call

    def compare(self, first: Tensor, second: Tensor) -> None:
        """Note whether a derivative is the same in both passes, in the first step that has a second pass.

        One step in which the outputs change is enough to know a loss that is linear in them. Later ones do not wait
        for the device.

        Args:
            first: What reached an output in the first pass.
            second: What reached it in the second.
        """
        if not self._has_compared and not is_capturing(first.device):
            self._unchanged.append(torch.equal(local_part(first), local_part(second)))

    def clear(self) -> None:
        """Drop what was noted, ready for the next first pass."""
        self.replaying = False
        self.round += 1
        self._number = 0
        self._seen: dict[str, tuple[str, ...]] = {}
        self._noted = {}
        self._notes: list[weakref.ref[_Note]] = []  # each lives as long as the graph of its call
        self._waiting: list[_Call] | None = None
        self._unchanged: list[bool] = []
        self._has_moved = False

    def _refuse_dependent(self, edges: Mapping[str, _Edge], name: str) -> None:
        """Raise if an output is computed from another, of this call or of an earlier one of the first pass.

        The gradient of that one would hold a part of the Jacobian at ``w``.

        Args:
            edges: Where the gradients of the outputs of this call enter the graph.
            name: The class of what was called.

        Raises:
            ValueError: If it is.
        """
        ends = {edge: path for path, edge in edges.items()}
        self._notes = [note for note in self._notes if note() is not None]
        if len(ends) < 2 and not self._notes:
            return
        pending, seen = [node for node, _ in ends], set[_Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            for after in node.next_functions:
                if after in ends:
                    raise ValueError(
                        f"{name} returned {', '.join(edges)}, and computes another of them from {ends[after]}, so that "
                        "its gradient is not that of the loss alone. Give outputs=, a callable that takes from what "
                        "the model returns the tensors that the loss is computed from"
                    )
                if after[0] is None:
                    continue
                note = after[0].metadata.get(self) if self._notes else None
                if note is not None and note.is_of(after[1]):
                    raise ValueError(
                        f"forward call {self._number + 1} of {name} is computed from an output of an earlier one, as "
                        "in a recurrent loop or a rollout, so that the gradient of that one is not that of the loss "
                        "alone. Put the loop into the forward of a module, call that, and give it as model=; or "
                        "detach the output before it is used again"
                    )
                pending.append(after[0])

    def _repeat(
        self,
        name: str,
        inputs: tuple[weakref.ref[Tensor], ...],
        in_backward: bool,
        outputs: tuple[_Output, ...],
        edges: Mapping[str, _Edge],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Match a call of the second pass, and put hooks on its outputs."""
        waiting = self._waiting_calls()
        alike = [call for call in waiting if call.in_backward == in_backward]
        call = next((call for call in alike if call.is_given(inputs)), alike[0] if alike else None)
        if call is None:
            for node, _ in _by_node(edges):
                node.register_prehook(_Refuse(self, len(self._noted)))
            return
        waiting.remove(call)
        if outputs != call.outputs:
            raise RuntimeError(
                f"forward call {call.number + 1} of {name} returned {_listed(call.outputs)} in the first pass and "
                f"{_listed(outputs)} in the second; both passes must run the same batches in the same order"
            )
        if call.sums is not None and not is_capturing(call.sums.device):
            self._has_moved = self._has_moved or not torch.equal(call.sums, _sums(tensors))
        for node, paths in _by_node(edges):
            node.register_prehook(_Replace(self, call, node, paths))

    def _waiting_calls(self) -> list[_Call]:
        """Return the calls of the first pass that the second has not repeated yet."""
        if self._waiting is None:
            self._waiting = [self._noted[number] for number in sorted(self._noted)]
        return self._waiting

    def _outputs_of(self, output: Any, name: str) -> dict[str, Tensor]:
        """Return the outputs that need a gradient, by path."""
        if self._choose is None:
            found = {path: tensor for path, tensor in named_logits(output).items() if tensor.requires_grad}
            # A model with a loss of its own may return what that is made of: per-token losses, whose derivative is a
            # constant, so that the step would be SAM's.
            if not found and any(tensor.requires_grad and tensor.dim() == 0 for tensor in tensors_in(output)):
                raise TypeError(
                    f"FunctionalGradient needs the outputs that the loss is computed from, but {name} returned "
                    f"{describe(output)}, with a scalar among it that may be the loss, and nothing named logits. Give "
                    "outputs=, a callable that takes the tensors that the loss is computed from. Where the model never "
                    "makes its logits, as a fused loss does not, switch that off"
                )
            found = found or floating_tensors(output)
        else:
            chosen = self._choose(output)
            tensors = [chosen] if isinstance(chosen, Tensor) else list(chosen)
            if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise TypeError(
                    "outputs= must return a tensor, or a sequence of tensors, of what the model returned; got "
                    f"{[type(tensor).__name__ for tensor in tensors]}"
                )
            found = {f"outputs[{index}]": tensor for index, tensor in enumerate(tensors)}
        return {path or "the output": tensor for path, tensor in found.items() if tensor.requires_grad}


class _Hook:
    """What runs before a node of the backward graph that made outputs of a call.

    Args:
        owner: What follows the calls.
        call: The call of the first pass.
        node: The node.
        paths: The outputs that it made, by their number among all that it made.
    """

    def __init__(self, owner: OutputGradients, call: _Call, node: _Node, paths: Mapping[int, str]) -> None:
        self._owner, self._call, self._paths = owner, call, paths
        self._key = tuple(paths.values())
        self._round = owner.round
        self._is_compiled = node.name().startswith("CompiledFunction")

    def is_of(self, number: int) -> bool:
        """Return whether it belongs to the present step, and to one of the outputs that the node made."""
        return self._owner.round == self._round and number in self._paths

    def __call__(self, gradients: _Gradients) -> _Gradients | None:
        if self._owner.round != self._round:
            return None
        if torch.is_grad_enabled():
            raise RuntimeError(
                "FunctionalGradient cannot be differentiated once more: backward was called with create_graph=True, "
                "and the derivative with respect to the outputs is a constant of the second pass; use samopt.SAM for a "
                "loss that contains a gradient"
            )
        if self._is_compiled and any(
            gradient is not None for number, gradient in enumerate(gradients) if number not in self._paths
        ):
            raise RuntimeError(
                f"the loss takes more from a compiled model than {', '.join(self._paths.values())}, and whether one "
                "output of it is computed from another cannot be told; compute the loss outside the compiled model, "
                "from these outputs alone, or give outputs="
            )
        return self.run(gradients)

    def run(self, gradients: _Gradients) -> _Gradients | None:
        """Note or replace the gradients that reached the outputs."""
        raise NotImplementedError


class _Note(_Hook):
    """Keeps the gradients of the first pass."""

    def run(self, gradients: _Gradients) -> None:
        if self._owner.replaying:
            raise RuntimeError(
                "the second pass differentiated a forward call of the first, whose Jacobian is the one at w; run the "
                "forward pass again inside 'with optimizer.perturbed():'"
            )
        chosen = [gradients[number] for number in self._paths]
        # Copies, since a hook of the user's or a function's backward may write into what autograd passes on.
        copies = tuple(None if gradient is None else gradient.detach().clone() for gradient in chosen)
        self._call.gradients.setdefault(self._key, deque()).append(copies)
        self._owner.add(self._call)


class _Replace(_Hook):
    """Puts the gradients of the first pass in the place of those of the second."""

    def run(self, gradients: _Gradients) -> _Gradients:
        queue = self._call.gradients.get(self._key)
        self._call.repeated.add(self._key)
        replaced = list(gradients)
        if queue is None:  # the loss did not take it at w
            known: _Gradients = (None,) * len(self._paths)
        elif queue:
            known = queue.popleft()
        else:
            raise RuntimeError(
                f"{', '.join(self._paths.values())} of forward call {self._call.number + 1} had more backward passes "
                "in the second pass than in the first; call backward as often in both"
            )
        for (number, path), gradient in zip(self._paths.items(), known, strict=True):
            present = gradients[number]
            if present is None and gradient is not None:
                raise RuntimeError(_no_longer_used(path, self._call))
            if present is not None and gradient is not None:
                self._owner.compare(gradient, present)
            replaced[number] = torch.zeros_like(present) if present is not None and gradient is None else gradient
        return tuple(replaced)


class _RefuseWrites:
    """What runs before the node that made what an output is a view of: raises if the output was written into.

    Such a write gives the output another place in the graph, so that its gradient does not come to the hooks on it.
    """

    def __init__(self, owner: OutputGradients, output: Tensor, name: str) -> None:
        self._owner, self._round, self._name = owner, owner.round, name
        self._counter = output.detach()
        if type(output) is Tensor:  # it keeps the output's version counter, and needs none of its memory
            self._counter.data = torch.empty(0, dtype=output.dtype, device=output.device)
        self._version = self._counter._version

    def __call__(self, gradients: _Gradients) -> None:
        if self._owner.round == self._round and self._counter._version != self._version:
            raise RuntimeError(
                f"{self._name} was written into after the forward (as logits /= 2 does), and it is a view, whose "
                "gradient cannot be followed then; write logits = logits / 2"
            )


class _Refuse:
    """What runs where the second pass differentiates a call that the first pass did not have."""

    def __init__(self, owner: OutputGradients, number: int) -> None:
        self._owner, self._round, self._number = owner, owner.round, number

    def __call__(self, gradients: _Gradients) -> None:
        if self._owner.round == self._round:
            raise RuntimeError(
                f"the first pass differentiated {self._number} forward call(s) of the model, and the second pass more; "
                "run the same forward and backward passes in both"
            )


def _sums(tensors: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(tensors.values())).device
    with torch.no_grad():
        return torch.stack([local_part(tensor.detach()).abs().double().sum().to(device) for tensor in tensors.values()])


def _edge_of(tensor: Tensor, path: str, name: str) -> _Edge:
    """Return where the gradient of an output enters the graph.

    Casts at the end are left out: a mixed-precision wrapper casts what a model returns, and a model that computes its
    own loss did so from the tensor before the cast. The Jacobian of a cast is the same at every weight.
    """
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name() == "ToCopyBackward0":
        node, number = node.next_functions[0]
    if node is None or type(node).__name__ == "AccumulateGrad":
        raise ValueError(
            f"{path} of {name} is a parameter or an input itself, whose gradient cannot be told from that of its other "
            "uses; give outputs=, a callable that takes the other outputs, or return parameter.clone()"
        )
    return node, number


def _by_node(edges: Mapping[str, _Edge]) -> list[tuple[_Node, dict[int, str]]]:
    """Return each node with the outputs that it made."""
    found: dict[_Node, dict[int, str]] = {}
    for path, (node, number) in edges.items():
        found.setdefault(node, {}).setdefault(number, path)
    return list(found.items())


def _no_longer_used(path: str, call: _Call) -> str:
    return (
        f"in the first pass the loss depended on {path} of forward call {call.number + 1}, and in the second pass it "
        "did not; the loss must take the same outputs in both"
    )


def _listed(outputs: Sequence[_Output]) -> str:
    return ", ".join(f"{path} of shape {shape} and {dtype}" for path, shape, dtype in outputs)
