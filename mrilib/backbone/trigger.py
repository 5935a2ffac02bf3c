"""The Trigger's learner: a small normalised linear map that takes one gradient step for every token and layer.

After Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024, arXiv:2407.04620. The
step changes θ, one factor for each of L versions of the weights. θ passes from layer to layer, not from token to token.
"""

import torch
from torch import Tensor, nn

from mrilib.precision import full_float32

RATE = 0.01  # step size η of the gradient step
EPS = 1e-6  # added to the variance in the normalisation

# θ for weight_linear, weight_ln, bias_linear and bias_ln, each (B, T, L)
TriggerState = tuple[Tensor, Tensor, Tensor, Tensor]


class TriggerWeights(nn.Module):
    """The Trigger's weights, shared by all layers: each holds L versions, which a token's θ weights and sums.

    Parameters
    ----------
    concept_dim : int
        C, input and output width.
    logit_dim : int
        L, number of versions.
    """

    def __init__(self, concept_dim: int, logit_dim: int) -> None:
        super().__init__()
        self.weight_linear = nn.Parameter(torch.empty(concept_dim, concept_dim, logit_dim))
        self.weight_ln = nn.Parameter(torch.empty(concept_dim, logit_dim))
        self.bias_linear = nn.Parameter(torch.empty(concept_dim, logit_dim))
        self.bias_ln = nn.Parameter(torch.empty(concept_dim, logit_dim))

    def forward(self, c_q: Tensor, c_k: Tensor, c_v: Tensor, theta: TriggerState | None) -> tuple[Tensor, TriggerState]:
        """Learn from (c_k, c_v) by one gradient step on θ, then predict at c_q.

        With W_t = W·θ_w and so on (contracting L), the step descends ½|w_t ẑ + c_t + c_k − c_v|², where ẑ is the
        normalised c_k W_t + b_t. Mean and deviation of the normalisation are constants in the gradient. W_t, a matrix
        for every token, is never formed: the product c_k W gives both c_k W_t and the gradient of θ_w.

        Parameters
        ----------
        c_q, c_k, c_v : Tensor, shape (B, T, C)
        theta : four Tensors, shape (B, T, L), optional
            For W, w (weight_ln), b (bias_linear), c (bias_ln), in this order; ones if not given.

        Returns
        -------
        h : Tensor, shape (B, T, C)
        theta : four Tensors, shape (B, T, L)
            After the step. Both are in float32, under autocast too: bfloat16 and TF32 round away a step of 0.01 at 1.
        """
        with torch.autocast(c_q.device.type, enabled=False), full_float32():
            return self._learn_and_predict(c_q, c_k, c_v, theta)

    def _learn_and_predict(
        self, c_q: Tensor, c_k: Tensor, c_v: Tensor, theta: TriggerState | None
    ) -> tuple[Tensor, TriggerState]:
        batch, length, width = c_q.shape
        tokens = batch * length
        c_q, c_k, c_v = (x.reshape(tokens, width).float() for x in (c_q, c_k, c_v))
        w, b, c = self.weight_ln.float(), self.bias_linear.float(), self.bias_ln.float()
        mixed = self.weight_linear.float().reshape(width, -1)
        if theta is None:
            one = c_q.new_ones(tokens, w.shape[1])
            theta = (one, one, one, one)
        th_w, th_lnw, th_b, th_lnb = (x.reshape(tokens, -1) for x in theta)

        k_mixed = (c_k @ mixed).view(tokens, width, -1)  # (N, C out, L)
        w_t = th_lnw @ w.t()
        z_hat, rstd = _normalise(torch.bmm(k_mixed, th_w.unsqueeze(2)).squeeze(2) + th_b @ b.t())
        e = w_t * z_hat + th_lnb @ c.t() + c_k - c_v
        r = w_t * e * rstd
        th_lnw = torch.addmm(th_lnw, e * z_hat, w, alpha=-RATE)
        th_lnb = torch.addmm(th_lnb, e, c, alpha=-RATE)
        th_w = th_w - RATE * torch.bmm(r.unsqueeze(1), k_mixed).squeeze(1)
        th_b = torch.addmm(th_b, r, b, alpha=-RATE)

        q_mixed = (c_q @ mixed).view(tokens, width, -1)
        z_hat, _ = _normalise(torch.bmm(q_mixed, th_w.unsqueeze(2)).squeeze(2) + th_b @ b.t())
        h = (th_lnw @ w.t()) * z_hat + th_lnb @ c.t() + c_q
        th_w, th_lnw, th_b, th_lnb = (x.view(batch, length, -1) for x in (th_w, th_lnw, th_b, th_lnb))
        return h.view(batch, length, width), (th_w, th_lnw, th_b, th_lnb)


def _normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z − mean) / √(var + eps) over the last axis, and 1 / √(var + eps)."""
    var, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + EPS)
    return (z - mean) * rstd, rstd
