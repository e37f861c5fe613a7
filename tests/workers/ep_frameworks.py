"""Paddle and torch for ``expert_parallel.py``: one interface, NumPy at every edge."""

import copy
import os
import sys
from contextlib import nullcontext

import numpy as np


def start(name: str):
    return {"paddle": Paddle, "torch": Torch}[name]()


def options(case) -> dict:
    """What both layers' constructors take."""
    return dict(
        num_experts=case["n_experts"], num_experts_per_tok=case["topk"], hidden_size=case["hidden"],
        intermediate_size=case["intermediate"], std=case["std"], **case["layer"],
    )  # fmt: skip


def _config(case):
    from sonicmoe.config import SonicMoEConfig

    return SonicMoEConfig(**case["config"]) if case["config"] else None


class _Framework:
    def make_layer(self, case):
        group = self.group_of_all() if case["copied"] and self.size > 1 else None
        layer = self.layer_class(**options(case), group=group, config=_config(case))
        self.steer(layer, case["steer"])
        return copy.deepcopy(layer) if case["copied"] else layer

    def forward_backward(self, layer, x, target, share: float, aux_weight: float) -> float:
        """The part of the loss that these rows are, as ``share`` of the whole batch."""
        given = self.tensor(x)
        out, aux = layer(given)
        wide = self.wide(given) + self.wide(out)
        loss = ((wide - self.tensor(target, "float32")) ** 2).sum() / max(x.size, 1)
        whole = (loss + aux_weight * aux) * share
        whole.backward()
        return float(whole)

    def gradients(self, layer) -> dict:
        layer.sum_shared_gradients()
        layer.step()
        return self.take_gradients(layer)

    def save_checkpoint(self, layer, optimizer, folder):
        from sonicmoe.ep import checkpoint

        shared, experts = {"step": optimizer.step}, {}
        for state in ("masters", "means", "squares"):
            alike, own = self.split(getattr(optimizer, state), layer)
            shared |= {f"{state} {name}": self.tensor(value, "float32") for name, value in alike.items()}
            experts |= {f"{state} {name}": [self.tensor(value, "float32") for value in own[name]] for name in own}
        checkpoint.save(folder, layer.comm, self.files, shared, experts, layer.held)

    def load_checkpoint(self, layer, optimizer, folder) -> int:
        from sonicmoe.ep import checkpoint

        shared, experts = checkpoint.load(folder, self.files, layer.held)
        for state in ("masters", "means", "squares"):
            arrays = getattr(optimizer, state)
            for name in arrays:
                kind, _, expert = name.partition("@")
                key = f"{state} {kind}"
                arrays[name] = self.array(experts[key][int(expert) - layer.held.start] if expert else shared[key])
        self.set_weights(layer, optimizer.masters)
        optimizer.step = shared["step"]
        return optimizer.step

    def split(self, arrays: dict, layer):
        """(replicated, {kind: [one for each expert of this rank]}) of arrays named ``name`` or ``kind@expert``."""
        shared = {name: value for name, value in arrays.items() if "@" not in name}
        kinds = {name.partition("@")[0] for name in arrays if "@" in name}
        return shared, {kind: [arrays[f"{kind}@{expert}"] for expert in layer.held] for kind in sorted(kinds)}

    def weights(self, layer) -> dict:
        """float32 arrays: replicated ones by name, experts' as ``kind@expert``."""
        found = {name: self.array(weight) for name, weight in self.shared_parameters(layer)}
        for kind, tensors in layer.expert_tensors().items():
            found |= {f"{kind}@{e}": self.array(t) for e, t in zip(layer.held, tensors, strict=True)}
        return found

    def set_weights(self, layer, arrays: dict) -> None:
        shared, experts = self.split(arrays, layer)
        for name, weight in self.shared_parameters(layer):
            self.set_value(weight, shared[name])
        kinds = {kind: tensors[0].dtype for kind, tensors in layer.expert_tensors().items()}
        layer.set_expert_tensors({k: [self.tensor(a, dtype) for a in experts[k]] for k, dtype in kinds.items()})

    def open_call(self, case, given):
        """(x, probs, the call of them); ``frozen`` names those that want no gradient."""
        from sonicmoe.ep.call import Wire

        dtypes = {"x": case["dtype"], "probs": "float32"}
        x, probs = ((self.tensor if n in (case["frozen"] or ()) else self.leaf)(given[n], dtypes[n]) for n in dtypes)
        indices = self.tensor(given["indices"], case["index_dtype"])
        transport, wire = self.transport(case, self.communicator()), Wire(**case["wire"])
        with self.autocast(case):
            (call,) = self.tape.open_calls([(x, probs, indices)], case["n_experts"], transport, wire, case["backward"])
        return x, probs, call

    def autocast(self, case, promote=False):
        return self.narrowed(promote) if case["autocast"] else nullcontext()

    def dispatch_combine(self, case, given) -> dict:
        tape, (x, probs, call) = self.tape, self.open_call(case, given)
        with self.autocast(case):
            rows, row_probs = tape.finish_dispatch(tape.begin_dispatch(x, probs, call), x, call)
        payload = call.take_payload()
        came = self.array(rows) if payload is None else self.dequantized(payload)
        # Beside a payload the rows have no values.
        wide = self.wide(rows) if payload is None else self.tensor(came, "float32")
        place = self.tensor(np.arange(1, case["topk"] + 1, dtype=np.float32), "float32")
        y = self.narrow(wide * 2 + (row_probs * place).sum(-1).reshape([-1, 1]))
        with self.autocast(case):
            out, found = tape.finish_combine(tape.begin_combine(y, call), call), {}
        if call.combine_grad_handle is not None:
            y.register_hook(lambda grad: found.update(dy=self.taken(call.combine_grad_handle)))
        dout = self.tensor(given["dout"], "bfloat16")
        with self.autocast(case, promote=True):  # so that it leaves what the caller did in between as it is
            out.backward(dout)
        return found | {
            "rows": came, "ids": self.array(call.local_indices), "probs": self.array(row_probs),
            "counts": np.array(call.counts), "out": self.array(out), "dx": self.array(x.grad),
            "ds": self.array(probs.grad),
        }  # fmt: skip

    def taken(self, handle):
        from sonicmoe.quant.formats import QuantTensor

        return self.dequantized(QuantTensor(handle.pop("data"), handle.pop("scale"), (1, 128)))

    def dequantized(self, payload):
        from sonicmoe.quant.naive import dequantize

        return self.array(dequantize(payload))

    def shared_parameters(self, layer):
        yield "router", layer.router.weight
        if layer.shared is not None:
            yield "shared up", layer.shared.up_gate_proj.weight
            yield "shared down", layer.shared.down_proj.weight

    def transport(self, case, comm):
        from sonicmoe.ep.transport import AllToAll

        return AllToAll(comm)


class Paddle(_Framework):
    def __init__(self):
        import paddle
        import paddle.distributed as dist

        self.paddle, self.dist = paddle, dist
        if "PADDLE_TRAINER_ENDPOINTS" in os.environ:
            dist.init_parallel_env()
        from sonicmoe.ep import paddle_communicator, paddle_layer, paddle_tape
        from sonicmoe.ep.checkpoint import paddle_files

        self.layer_class, self.tape, self.files = paddle_layer.ExpertParallelMoE, paddle_tape, paddle_files()
        self.communicator = paddle_communicator.of
        comm = self.communicator()
        self.rank, self.size = comm.rank, comm.size

    def finish(self):
        pass

    def group_of_all(self):
        return self.dist.get_group()

    def tensor(self, values, dtype="bfloat16"):
        values = np.asarray(values)
        kind = np.float32 if values.dtype.kind == "f" else values.dtype
        return self.paddle.to_tensor(values.astype(kind)).astype(dtype)

    def leaf(self, values, dtype):
        made = self.tensor(values, dtype)
        made.stop_gradient = False
        return made

    def array(self, tensor):
        kind = str(tensor.dtype).rsplit(".", 1)[-1]
        return np.array((tensor.detach().astype("float32") if kind in ("bfloat16", "float16") else tensor).numpy())

    def wide(self, tensor):
        return tensor.astype("float32")

    def narrow(self, tensor):
        return tensor.astype("bfloat16")

    def expert_parameters(self, layer):
        return layer.experts.parameters()

    def freeze(self, weights):
        for weight in weights:
            weight.stop_gradient = True

    def narrowed(self, promote):
        """On the plugin: on a CPU Paddle says that it makes no effect."""
        return self.paddle.amp.auto_cast(level="O2", dtype="float16", use_promote=promote)

    def sum_of(self, value: float) -> float:
        if self.size == 1:
            return value
        total = self.paddle.to_tensor([value], dtype="float64")
        self.dist.all_reduce(total)
        return float(total[0])

    def steer(self, layer, steps):
        if steps is not None:
            layer.balance_steps.set_value(self.paddle.to_tensor(steps))

    def set_value(self, weight, values):
        weight.set_value(self.tensor(values, weight.dtype))

    def take_gradients(self, layer):
        found = {}
        for name, weight in self.shared_parameters(layer):
            found[name] = self.array(weight.grad)
            weight.clear_gradient(set_to_zero=False)
        for expert, module in zip(layer.held, layer.experts.children(), strict=True):
            for kind in ("up_gate_proj", "down_proj"):
                weight = getattr(module, kind).weight
                grad = weight.main_grad if getattr(weight, "main_grad", None) is not None else None
                found[f"{kind}.weight@{expert}"] = (
                    self.array(grad) if grad is not None else np.zeros(weight.shape, np.float32)
                )
                weight.main_grad = None
        return found


class Torch(_Framework):
    def __init__(self):
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        torch.use_deterministic_algorithms(True)
        if "LOCAL_RANK" in os.environ:
            import torch._dynamo  # which recompute imports: see tools/ci/multicard_worker.py

            dist.init_process_group("gloo")
        from tests.support import deep_ep_stub

        sys.modules["deep_ep"] = deep_ep_stub
        from sonicmoe.ep import torch_communicator, torch_layer, torch_tape
        from sonicmoe.ep.checkpoint import torch_files

        self.layer_class, self.tape, self.files = torch_layer.ExpertParallelMoE, torch_tape, torch_files()
        self.communicator = torch_communicator.of
        comm = self.communicator()
        self.rank, self.size = comm.rank, comm.size

    def finish(self):
        if self.size > 1:
            self.dist.barrier()
            self.dist.destroy_process_group()

    def group_of_all(self):
        return self.dist.group.WORLD

    def transport(self, case, comm):
        if not case.get("deepep"):
            return super().transport(case, comm)
        from sonicmoe.ep.deepep import DeepEp

        return DeepEp()

    def make_layer(self, case):
        layer = super().make_layer(case).to(self.torch.bfloat16)
        layer.router.float()
        for weight in (layer.c_fc.weight, layer.c_proj.weight):
            weight.main_grad = self.torch.zeros(weight.shape)
        return layer

    def tensor(self, values, dtype="bfloat16"):
        made = self.torch.from_numpy(np.ascontiguousarray(values))
        return made.to(getattr(self.torch, dtype) if isinstance(dtype, str) else dtype)

    def leaf(self, values, dtype):
        return self.tensor(values, dtype).requires_grad_()

    def array(self, tensor):
        narrow = tensor.dtype in (self.torch.bfloat16, self.torch.float16)
        return np.array((tensor.detach().float() if narrow else tensor.detach()).numpy())

    def wide(self, tensor):
        return tensor.float()

    def narrow(self, tensor):
        return tensor.bfloat16()

    def expert_parameters(self, layer):
        return [layer.c_fc.weight, layer.c_proj.weight]

    def freeze(self, weights):
        for weight in weights:
            weight.requires_grad_(False)

    def narrowed(self, promote):
        return self.torch.autocast("cpu", self.torch.bfloat16)

    def sum_of(self, value: float) -> float:
        if self.size == 1:
            return value
        total = self.torch.tensor([value], dtype=self.torch.float64)
        self.dist.all_reduce(total)
        return float(total[0])

    def steer(self, layer, steps):
        if steps is not None:
            layer.balance_steps.copy_(self.torch.tensor(steps))

    def set_value(self, weight, values):
        weight.data.copy_(self.tensor(values, weight.dtype))

    def take_gradients(self, layer):
        found = {}
        for name, weight in self.shared_parameters(layer):
            found[name] = self.array(weight.grad).copy()
            weight.grad = None
        for kind, weight in (("c_fc.weight", layer.c_fc.weight), ("c_proj.weight", layer.c_proj.weight)):
            for place, expert in enumerate(layer.held):
                found[f"{kind}@{expert}"] = self.array(weight.main_grad[place]).copy()
            weight.main_grad.zero_()
        return found
