"""Gradient balancing in automatic optimisation: ``training_step`` returns a loss per task, ``backward`` balances."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reweigh.losses.gradient_balancing import GradientBalancer

from ._base import PREFIX


class GradientBalancing:
    """Mixin for a LightningModule that holds a :class:`~reweigh.losses.GradientBalancer`, before the base class.

    ``training_step`` returns ``self.balancer(losses)``, the ``(K,)`` losses; Lightning divides them for accumulation
    and scales them for 16-bit training, and this ``backward`` balances them. Scalar losses go their usual way.

    Weights are logged as ``reweigh/<path>/weight/<task>`` at the Trainer's ``log_every_n_steps``. Works with
    ``pytorch_lightning`` and ``lightning.pytorch``, on one device and with ``strategy="ddp"``.

    Example:
        >>> import torch, pytorch_lightning as pl
        >>> from reweigh.losses import GradientBalancer
        >>> def equal_length(gramian):
        ...     return gramian.diagonal().rsqrt()
        >>> class Net(GradientBalancing, pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 2)
        ...         self.balancer = GradientBalancer(equal_length, ["left", "right"])
        ...     def training_step(self, batch):
        ...         left, right = self.net(batch).square().mean(0)
        ...         return self.balancer({"left": left, "right": right})
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Balance a vector of losses; leave a scalar to Lightning."""
        module: Any = self
        if loss.ndim == 0:
            module_backward: Any = super()
            module_backward.backward(loss, *args, **kwargs)
            return
        path, balancer = _the_balancer(module, loss)
        known = {id(parameter) for parameter in balancer.parameters()}
        balancer.backward(loss, [p for p in module.parameters() if id(p) not in known], **kwargs)
        if module._trainer is not None and not module.trainer.barebones:
            values = {f"{PREFIX}/{path}/{name}": value for name, value in balancer.summary().items()}
            if values:
                module.log_dict(values, on_step=True, on_epoch=False, sync_dist=False, batch_size=1)


def _the_balancer(module: Any, loss: Tensor) -> tuple[str, GradientBalancer]:
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, GradientBalancer)]
    fits = [(name, part) for name, part in found if len(part.tasks) == loss.numel()]
    called = [(name, part) for name, part in fits if part._open is not None]
    if len(called) != 1:
        raise ValueError(
            f"GradientBalancing: training_step returned {tuple(loss.shape)} losses, and {len(called)} of the module's "
            f"{len(found)} balancers made such a vector; return self.balancer(losses) of one GradientBalancer"
        )
    return called[0]
