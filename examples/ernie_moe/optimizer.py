"""AdamW that reads ``main_grad`` and keeps fp32 masters of bf16 parameters.

Paddle's AdamW has no bf16 kernel on the CPU, so it is given the masters; each step ends by rounding them into the
parameters. An fp32 parameter is its own master. A parameter's gradient is its ``main_grad`` where it has one, else
its ``grad``.
"""

import paddle

# Paddle names an optimizer's state "<parameter's name>_<one of these>". The parameter's name is a counter that
# depends on what else the process has built, so checkpoints use the model's own names instead.
_STATES = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")


class MainGradAdamW:
    """``named_parameters`` is ``model.named_parameters()``; the other arguments are ``paddle.optimizer.AdamW``'s."""

    def __init__(self, named_parameters, learning_rate=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0):
        self.parameters = {name: p for name, p in named_parameters if not p.stop_gradient}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        matrices = {m.name for m in self.masters.values() if len(m.shape) > 1}
        self._adamw = paddle.optimizer.AdamW(
            learning_rate=learning_rate,
            beta1=beta1,
            beta2=beta2,
            parameters=list(self.masters.values()),
            weight_decay=weight_decay,
            apply_decay_param_fun=matrices.__contains__,  # decaying a norm's gain towards 0 makes no sense
            grad_clip=paddle.nn.ClipGradByGlobalNorm(clip_norm) if clip_norm else None,
        )

    def set_lr(self, learning_rate: float):
        self._adamw.set_lr(learning_rate)

    def get_lr(self) -> float:
        return self._adamw.get_lr()

    def step(self):
        for name, p in self.parameters.items():
            main_grad = getattr(p, "main_grad", None)
            if main_grad is not None:
                self.masters[name].grad = main_grad
            elif self.masters[name] is not p:  # else the gradient is where it should be
                self.masters[name].grad = _as_fp32(p.grad)
        self._adamw.step()
        self._write_back()

    def clear_grad(self):
        for name, p in self.parameters.items():
            # None, not zeros: a later step would take those for a gradient and move by momentum and decay.
            p.main_grad = p.grad = self.masters[name].grad = None

    def state_dict(self) -> dict:
        """Masters of bf16 parameters and AdamW's state, under the model's names."""
        adamw = self._adamw.state_dict()
        state = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                state[f"{name}.master"] = master.clone().detach()
            for key in _STATES:
                if f"{master.name}_{key}" in adamw:
                    state[f"{name}.{key}"] = adamw[f"{master.name}_{key}"].clone().detach()
        return state

    def set_state_dict(self, state: dict):
        """Continue bit for bit from ``state_dict``. Load the model's own state dict before, for its fp32 parameters."""
        needed = {f"{name}.master" for name, m in self.masters.items() if m is not self.parameters[name]}
        known = needed | {f"{name}.{key}" for name in self.masters for key in _STATES}
        for what, names in (("has", set(state) - known), ("lacks", needed - set(state))):
            if names:
                raise ValueError(f"state: it {what} {sorted(names)}; it must come from an optimizer of the same model")
        adamw = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.set_value(state[f"{name}.master"])
            for key in _STATES:
                if f"{name}.{key}" in state:
                    adamw[f"{master.name}_{key}"] = state[f"{name}.{key}"]
        self._adamw.set_state_dict(adamw)
        self._write_back()

    def _write_back(self):
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].set_value(master.astype(self.parameters[name].dtype))


def _master(parameter):
    if parameter.dtype == paddle.float32:
        return parameter
    master = paddle.create_parameter(parameter.shape, "float32")
    master.set_value(parameter.astype("float32"))
    return master


def _as_fp32(grad):
    return grad if grad is None or grad.dtype == paddle.float32 else grad.astype("float32")
