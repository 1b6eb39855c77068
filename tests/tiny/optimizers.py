"""Small optimizers of the kinds that people use, for where their packages are not installed."""

import torch


class Small(torch.optim.Optimizer):
    """Skips what has no gradient; a subclass says how the rest moves. lr: learning rate."""

    def __init__(self, parameters, lr=1e-2, **others):
        super().__init__(parameters, {"lr": lr, "beta": 0.9, "weight_decay": 0.1} | others)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, self.state[parameter], group)


class Lion(Small):
    """arXiv:2302.06675: the sign of a mix of momentum and gradient."""

    def move(self, parameter, gradient, state, group):
        momentum = state.setdefault("exp_avg", torch.zeros_like(gradient))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * torch.lerp(gradient, momentum, group["beta"]).sign())
        momentum.lerp_(gradient, 1 - group["beta"])


class Projected(Small):
    """As GaLore (arXiv:2403.03507) and APOLLO: momentum of a projection of the gradient, so of another shape."""

    def move(self, parameter, gradient, state, group):
        if gradient.dim() == 2 and "basis" not in state:
            state["basis"] = torch.linalg.svd(gradient, full_matrices=False)[2][:4]
        low = gradient @ state["basis"].T if "basis" in state else gradient
        momentum = state.setdefault("exp_avg", torch.zeros_like(low)).lerp_(low, 1 - group["beta"])
        parameter.sub_(group["lr"] * (momentum @ state["basis"] if "basis" in state else momentum))


class ScheduleFree(Small):
    """arXiv:2405.15682 with plain gradients: in training the weights are y, in evaluation x; z is kept."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, lr, train_mode=True, k=0)

    def step(self, closure=None):
        assert all(group["train_mode"] for group in self.param_groups)
        for group in self.param_groups:
            group["k"] += 1
        super().step()

    def move(self, parameter, gradient, state, group):
        z = state.setdefault("z", parameter.clone())
        x = torch.lerp(parameter, z, 1 - 1 / group["beta"])
        z.sub_(group["lr"] * gradient)
        x.lerp_(z, 1 / group["k"])
        parameter.copy_(torch.lerp(z, x, group["beta"]))

    def eval(self):
        self._exchange(True, lambda beta: 1 - 1 / beta)

    def train(self):
        self._exchange(False, lambda beta: 1 - beta)

    @torch.no_grad()
    def _exchange(self, mode, share):
        for group in self.param_groups:
            if group["train_mode"] is mode:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], share(group["beta"]))
                group["train_mode"] = not mode


class Together(torch.optim.Optimizer):
    """Several optimizers as one, as people write it for Muon."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.defaults = {"lr": 0.0}

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class Coasting(torch.optim.SGD):
    """Moves on along its momentum where there is no gradient."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return super().step()


class Decaying(torch.optim.SGD):
    """Decays every weight, whether it has a gradient or not."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            torch._foreach_mul_([parameter.data for parameter in group["params"]], 0.999)


def muon(model):
    """torch's Muon for the matrices of the blocks, AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.requires_grad and p.dim() == 2 and "layers" in name]
    held = set(matrices)
    rest = [p for _, p in named if p.requires_grad and p not in held]
    return Together(torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2))
