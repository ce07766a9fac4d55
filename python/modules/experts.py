"""The routed experts of a mixture, stacked: y_t = sum_j w_tj D_e act(U_e x_t), e = indices[t,j].

U (e,m,l), or for SwiGLU (e,2m,l) with the gate rows first; D (e,l,m). Names are those of transformers' experts.
"""

import torch
from torch import Tensor, nn

from tigon.ops import Routing, moe_experts

# Of each parameter: an expert's own tensors that stand in its rows, in order.
PIECES = {
    "up_proj": ("up_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


class Experts(nn.Module):
    """x (t,l) and a routing -> (t,l).

    Args:
        experts (e), width (l), hidden (m): how many, of what size. activation, weight_placement, save: as in
            `tigon.moe_experts`.

    Parameters: up_proj (e,m,l) or, gated, gate_up_proj (e,2m,l); down_proj (e,l,m). `load_state_dict` stacks tensors of
    single experts (0.up_proj.weight, ...) too. Where both parameters have a fp32 `main_grad`, their gradients are added
    to it, and `grad` stays None.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: str = "relu2",
        weight_placement: str = "after_down",
        save: str = "hidden",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation, self.weight_placement, self.save = activation, weight_placement, save
        self.gated = activation == "swiglu"
        factory = {"device": device, "dtype": dtype}
        up = nn.Parameter(torch.empty(experts, hidden * (1 + self.gated), width, **factory))
        self.register_parameter(self.up_name, up)
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden, **factory))
        for weight in (up, self.down_proj):  # as nn.Linear's
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def up(self) -> Tensor:
        """The first product's weight, under either name."""
        return getattr(self, self.up_name)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        buffers = [getattr(w, "main_grad", None) for w in (self.up, self.down_proj)]
        return moe_experts(
            *(x, self.up, self.down_proj, routing),
            activation=self.activation,
            weight_placement=self.weight_placement,
            save=self.save,
            grad_buffers=None if None in buffers else tuple(buffers),
            accumulate=True,
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        experts = range(self.down_proj.shape[0])
        for whole in (self.up_name, "down_proj"):
            names = [[f"{prefix}{j}.{part}.weight" for part in PIECES[whole]] for j in experts]
            if all(name in state_dict for expert in names for name in expert):
                each = [torch.cat([state_dict.pop(name) for name in expert]) for expert in names]
                state_dict[prefix + whole] = torch.stack(each)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        e, l, m = self.down_proj.shape
        return f"{e}, width={l}, hidden={m}, activation={self.activation!r}, save={self.save!r}"
