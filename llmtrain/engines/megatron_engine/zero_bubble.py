"""The zero-bubble schedule, run with megatron-core's passes and messages: only the order of things is ours."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    backward_step,
    deallocate_output_tensor,
    forward_step,
    get_tensor_shapes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llmtrain.models.attention.multi_head import Attention
from llmtrain.models.experts.mixture import Experts
from llmtrain.models.weight_gradients import WeightGradients
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.pipeline_schedule import Action, Compute, Message, Receive, Send, plan_zero_bubble
from llmtrain.parallel.tensor import ColumnLinear, RowLinear

Handles = dict[str, dist.Work]
"""What is under way, by megatron-core's names."""

ForwardStep = Callable[[Iterator[Any], DistributedDataParallel], tuple[Tensor, Callable[..., Any]]]
"""As megatron-core's schedules call it."""


def defer_weight_gradients(model: nn.Module, held: WeightGradients) -> None:
    """Let all linears and experts of a model leave the gradients of their weights to `held`."""
    for module in model.modules():
        if type(module) is nn.Linear:  # not one of another kind, whose products are its own
            module.forward = partial(linear_forward, module, held)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, Experts):
            module.product = held.grouped_linear
        elif isinstance(module, Attention):
            module.joint_product = held.joint_product
        elif isinstance(module, ColumnLinear | RowLinear):
            # Private: the product of their forward pass and nothing else, behind and before what ranks say to each
            # other. megatron-core's own way to defer it is Transformer Engine's, or for the head alone.
            module._forward_impl = partial(split_linear_forward, held)  # type: ignore[method-assign]


def linear_forward(linear: nn.Linear, held: WeightGradients, x: Tensor) -> Tensor:
    return held.linear(x, linear.weight, linear.bias)  # looked up now: a model on the meta device gets others


def split_linear_forward(
    held: WeightGradients, *, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any
) -> Tensor:
    """Under megatron-core's names."""
    return held.linear(input, weight, bias, two_steps=True)


class ZeroBubble:
    """Runs the steps of one pipeline stage in the order of the plan."""

    def __init__(
        self, chunk: DistributedDataParallel, held: WeightGradients, groups: Groups, seq_length: int, batch_size: int
    ) -> None:
        self.chunk, self.held, self.groups = chunk, held, groups
        self.config: TransformerConfig = chunk.config
        self.communicator = P2PCommunicator(groups.pipeline, self.config)
        (self.shape,) = get_tensor_shapes(
            seq_length=seq_length, micro_batch_size=batch_size, decoder_seq_length=seq_length,
            config=self.config, tp_group=groups.tensor, cp_group=groups.context,
        )  # fmt: skip

    def run(self, forward: ForwardStep, data: Iterator[Any], num_micro_batches: int) -> list[Tensor]:
        """Forward and backward of a step, and the reduction of its gradients; returns what `forward` reports on the
        last stage, as megatron-core's schedules do."""
        step = StageStep(self, forward, data, num_micro_batches)
        for action in plan_zero_bubble(self.groups.place.pipeline, self.groups.layout.pipeline, num_micro_batches):
            step.do(action)
        step.finish()
        assert self.config.finalize_model_grads_func is not None, "the engine has set it"
        self.config.finalize_model_grads_func([self.chunk])
        return step.reports


class StageStep:
    """One step of a stage: the tensors and messages that are under way."""

    def __init__(self, pipeline: ZeroBubble, forward: ForwardStep, data: Iterator[Any], num_micro_batches: int) -> None:
        self.pipeline, self.config = pipeline, pipeline.config
        self.forward, self.data, self.num_micro_batches = forward, data, num_micro_batches
        self.reports: list[Tensor] = []
        self.inputs: dict[int, Tensor | None] = {}
        self.outputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        """Of the inputs, until they are sent."""
        self.receiving: dict[Receive, tuple[Tensor, Handles]] = {}
        self.sending: dict[Message, tuple[Tensor, Handles]] = {}

    def do(self, action: Action) -> None:
        match action:
            case Receive():
                self.receiving[action] = self._begin(action.message, None)
            case Send("activation", number):
                self._send("activation", self.outputs[number])
            case Send("gradient", number):
                self._send("gradient", self.gradients.pop(number))
            case Compute("forward", number):
                self._forward(number)
            case Compute("input_gradient", number):
                self._backward(number)
            case Compute():
                self.pipeline.held.compute_oldest()

    def _begin(self, message: Message, sent: Tensor | None) -> tuple[Tensor, Handles]:
        """Begin to send a tensor, or to receive one, and return it with the handles to wait for."""
        communicator: Any = self.pipeline.communicator
        # Of megatron-core's functions these two need not wait. Called for one thing only, they do nothing else.
        exchange = {
            "activation": communicator.send_forward_recv_forward,
            "gradient": communicator.send_backward_recv_backward,
        }[message]
        received, handles = exchange(sent, sent is None, self.pipeline.shape, overlap_p2p_comm=True)
        return (received if sent is None else sent), handles

    def _send(self, message: Message, tensor: Tensor) -> None:
        # The neighbour has begun to receive the one before when it made what this one was made of: no wait in vain.
        self._sent(message)
        self.sending[message] = self._begin(message, tensor)

    def _sent(self, message: Message) -> None:
        """Let go of the tensor that has been sent last."""
        if message in self.sending:
            tensor, handles = self.sending.pop(message)
            wait(handles)
            if message == "activation":  # its graph is still needed, its content is not
                deallocate_output_tensor(tensor, self.config.deallocate_pipeline_outputs)

    def _received(self, message: Message, number: int) -> Tensor | None:
        """What has been received for a micro-batch; None at an end of the pipeline."""
        tensor, handles = self.receiving.pop(Receive(message, number), (None, {}))
        wait(handles)
        return tensor

    def _forward(self, number: int) -> None:
        groups, received = self.pipeline.groups, self._received("activation", number)
        outputs, _ = forward_step(
            self.forward, self.data, self.pipeline.chunk, self.num_micro_batches, [received], self.reports,
            self.config, groups.layout.context, is_last_stage=groups.place.pipeline == groups.layout.pipeline - 1,
        )  # fmt: skip
        self.inputs[number], self.outputs[number] = received, outputs[0]

    def _backward(self, number: int) -> None:
        """The gradient of the input, and of all weights but those that are left for later."""
        output, received = self.outputs.pop(number), self._received("gradient", number)
        if "activation" in self.sending and self.sending["activation"][0] is output:
            self._sent("activation")  # its gradient is here, and megatron-core's pass wants its content to be gone
        gradient: Any = backward_step(
            self.inputs.pop(number), [output], [received], self.pipeline.chunk.module.model_type, self.config
        )
        self.pipeline.held.close()
        if gradient is not None:  # a first stage has no input
            self.gradients[number] = gradient

    def finish(self) -> None:
        """Wait until the last messages have been sent."""
        self._sent("activation")
        self._sent("gradient")


def wait(handles: Handles) -> None:
    """On a GPU its stream waits, on a CPU the host."""
    for handle in handles.values():
        handle.wait()
