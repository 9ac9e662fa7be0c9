"""`deepen` under several static ensembles at once, where rows of the matrices are one-hot.

All experts divide a class's mass among the main member's pieces in the same way, so that they differ in the masses of
classes alone: a token costs a look-up per linear expert, and the mixture one vector of class masses, not K fusions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_deepen.fusion._threads import in_parts
from lm_eval_deepen.fusion.base import Fused
from lm_eval_deepen.relative.average import FLOOR, nobodys
from lm_eval_deepen.relative.matrix import OneHotOperator
from lm_eval_deepen.relative.support import Side, abstain, shares, split
from lm_eval_deepen.relative.topk import NEG_INF
from lm_eval_deepen.solvers.em import SMALLEST
from lm_eval_deepen.solvers.exact import LITTLE, UNDERFLOWS
from lm_eval_deepen.weighting.experts import Experts

ROWS = 16  # worked on at once: the class masses of all geometric experts stay in a core's cache


class OneHotExperts:
    """Rows under all experts, in parts of a few rows each."""

    def __init__(self, logp: Sequence[Tensor], weights: Tensor, experts: Experts, sides: Sequence[Side]) -> None:
        """Compute the class masses; arguments as `DeepenFuser.experts`."""
        self.device = logp[0].device
        weights = weights.to(self.device)
        self.parts: list[_Part] = in_parts(
            len(weights), ROWS, self.device,
            lambda part: _Part([rows[part] for rows in logp], weights[part], experts, sides),
        )  # fmt: skip
        starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)
        self.starts = starts[:-1].to(self.device)

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return every expert's log-probability [n, K] (fp64) of a token in a row, for n pairs of them."""
        rows, tokens = rows.to(self.device), tokens.to(self.device)
        owner = torch.searchsorted(self.starts, rows.contiguous(), right=True) - 1
        logp = torch.empty(len(rows), self.parts[0].experts, dtype=torch.float64, device=self.device)
        for index in owner.unique().tolist():
            mine = owner == index
            logp[mine] = self.parts[index].at(rows[mine] - self.starts[index], tokens[mine])
        return logp

    def mixed(self, log_posterior: Tensor) -> Fused:
        """Return the experts' mixture under each row's log posterior [B, K]."""
        bounds = [*self.starts.tolist(), len(log_posterior)]
        out = torch.empty(len(log_posterior), self.parts[0].columns, device=self.device)
        ends: list[Tensor] = in_parts(
            len(self.parts), 1, self.device,
            lambda part: torch.cat(
                [
                    self.parts[i].mixed(log_posterior[bounds[i] : bounds[i + 1]], out[bounds[i] : bounds[i + 1]])
                    for i in range(part.start, min(part.stop, len(self.parts)))
                ]
            ),
        )  # fmt: skip
        return Fused(out, {"end_mass": torch.cat(ends)})


class _Part:
    """A few rows: the members' class masses, and what every expert makes of them.

    An expert's probability of a text piece w of class a is p_0(w) (r[a] + s) / (q_0[a] + s) / m, with q_0 the main
    member's class masses, r the expert's, s = `SMALLEST` and m what the quotients sum to under q_0: `inverse: exact`.
    """

    def __init__(self, logp: Sequence[Tensor], weights: Tensor, experts: Experts, sides: Sequence[Side]) -> None:
        geometric = experts.geometric
        self.side, self.main = sides[0], logp[0]
        self.experts, self.columns = weights.shape[1], logp[0].shape[1]
        operators = [side.matrix.full() for side in sides]
        one_hot = [op for op in operators if isinstance(op, OneHotOperator)]
        self.operator = one_hot[0]
        active = weights.amax(1) > 0  # [b, M]
        given = [logp[0], *(abstain(rows, active[:, m]) for m, rows in enumerate(logp[1:], start=1))]
        parts = split(given, sides, with_end=len(self.side.eos) > 0, one_hot=one_hot)
        self.log_sum, self.log_total, kept = parts.log_sum[:, 0], parts.log_total[:, 0], parts.log_kept[:, 0]
        share = shares(weights.float(), parts.valid[:, None, :])  # [b, K, M]
        # A linear average without text is not fused; a geometric one takes no text for little text.
        text_of_some = ((share > 0) & (parts.log_text > NEG_INF)[:, None, :]).any(2) | geometric.to(share.device)
        share = shares(share, text_of_some[..., None])
        classes = [own for own in parts.classes if own is not None]  # [b, A] each, given text
        self.own = classes[0]
        reached = (self.own / (self.own + SMALLEST)).masked_fill_(self.own < UNDERFLOWS, 0.0)  # else 1, nearly
        spare = SMALLEST * reached.sum(1)

        log_share = share.log()
        log_text = torch.logsumexp(log_share + parts.log_text[:, None, :], dim=2)  # [b, K], of a linear average
        log_end = torch.logsumexp(log_share + parts.log_end[:, None, :], dim=2)
        usable = log_text > NEG_INF
        blend = (log_share + parts.log_text[:, None, :] - log_text.masked_fill(~usable, 0.0)[..., None]).exp()
        self.linear = ~geometric
        self.classes = torch.stack(classes)  # [M, b, A]
        mass = torch.einsum("bkm,mb->bk", blend, torch.stack([(own * reached).sum(1) for own in classes]))
        self.pooled: list[tuple[int, Tensor]] = []  # class masses [b, A] of every geometric expert
        if bool(geometric.any()):
            zeros = [own == 0 for own in classes]
            logs = [own.masked_fill(zero, FLOOR).log_() for own, zero in zip(classes, zeros, strict=True)]
            underflows = bool(zeros[0].any())
            for k in geometric.nonzero()[:, 0].tolist():
                exponents = share[:, k] * float(experts.power[k])  # [b, M]
                r = exponents[:, :1] * logs[0]
                for m, own in enumerate(logs[1:], start=1):
                    r.addcmul_(exponents[:, m, None], own)
                if underflows:
                    r.masked_fill_(nobodys(zeros, share[:, k]), NEG_INF)
                r = torch.softmax(r, dim=1)
                self.pooled.append((k, r))
                mass[:, k] = (r * reached).sum(1)
                text, end = _mean(exponents, parts.log_text), _mean(exponents, parts.log_end)
                if not len(self.side.eos):
                    end = torch.full_like(text, NEG_INF)
                both = torch.logaddexp(text, end)
                log_text[:, k], log_end[:, k] = text - both, end - both
        self.usable = parts.log_text[:, 0] > NEG_INF
        self.blend = blend
        self.log_mass = (mass + spare[:, None]).clamp_min(SMALLEST).log()
        self.log_text, self.log_end, self.kept = log_text, log_end, kept
        self.own_end = parts.log_end[:, 0]

    def __len__(self) -> int:
        return len(self.main)

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return [n, K]; `rows` are those of this part."""
        anchor = self.operator.classes[tokens]
        described = anchor < self.operator.num_anchors
        at = anchor.clamp(max=self.operator.num_anchors - 1)
        mass = torch.einsum("nkm,mn->nk", self.blend[rows], self.classes[:, rows, at])
        for k, r in self.pooled:
            mass[:, k] = r[rows, at]
        own = self.own[rows, at][:, None]
        log_mass = self.log_mass[rows]
        gain = ((mass + SMALLEST) / (own + SMALLEST)).log()
        gain -= log_mass.masked_fill((own < UNDERFLOWS) & (log_mass < math.log(LITTLE)), 0.0)
        given = self.main[rows, tokens].float()
        text = gain.masked_fill(~described[:, None], 0.0) + self.log_text[rows]
        logp = text + (given - self.log_sum[rows] + self.kept[rows])[:, None]
        control, unused, eos = (torch.isin(tokens, ids) for ids in (self.side.control, self.side.unused, self.side.eos))
        own = given - self.log_total[rows]
        logp = torch.where(control[:, None], own[:, None], logp)
        if bool(eos.any()):
            ends = torch.zeros_like(given)
            ends[eos] = given[eos] - torch.logsumexp(self.main[rows[eos]][:, self.side.eos].float(), dim=1)
            ends = ends.masked_fill(ends.isnan(), -math.log(len(self.side.eos)))
            logp = torch.where(eos[:, None], self.log_end[rows] + (ends + self.kept[rows])[:, None], logp)
        logp = torch.where(self.usable[rows, None], logp, own[:, None].expand_as(logp))
        return logp.masked_fill(unused[:, None], NEG_INF).double()

    def mixed(self, log_posterior: Tensor, out: Tensor) -> Tensor:
        """Write the mixture to `out` [b, V_0] and return the mass of its end [b]."""
        share = log_posterior.to(self.log_text)
        text = share + self.log_text  # [b, K]
        scale, few = (text - self.log_mass).exp(), self.log_mass < math.log(LITTLE)
        r = self._averaged(scale)
        if bool(few.any()):
            r = torch.where(self.own < UNDERFLOWS, self._averaged(torch.where(few, text.exp(), scale)), r)
        r.div_(self.own + SMALLEST).log_()
        moved = self.kept - self.log_sum
        empty = torch.logsumexp(text, dim=1) + moved
        self.operator.gather(r.add_(moved[:, None]), empty[:, None], out=out).add_(self.main)
        end = torch.logsumexp(share + self.log_end, dim=1) + self.kept
        write_rest(out, self.main, self.side, end, self.log_total, self.usable)
        return torch.where(self.usable, end, self.own_end + self.kept).exp()

    def _averaged(self, scale: Tensor) -> Tensor:
        """Return the sum over experts [b, A] of their class masses and s, each times its scale [b, K]."""
        coefficient = torch.einsum("bk,bkm->bm", scale * self.linear.to(scale), self.blend)
        r = torch.einsum("bm,mba->ba", coefficient, self.classes)
        for k, pooled in self.pooled:
            r.addcmul_(scale[:, k, None], pooled)
        return r.add_(SMALLEST * scale.sum(1, keepdim=True))


def write_rest(out: Tensor, main: Tensor, side: Side, end: Tensor, total: Tensor, usable: Tensor) -> None:
    """Complete fused text pieces in place: ends of text, control pieces, unused ids, and rows that were not fused.

    Args:
        out: the fused rows [B, V_0].
        main: the main member's rows as given [B, V_0].
        side: its ids by role.
        end: fused log mass of the end of text [B], which is shared out as the main member does.
        total: log mass of everything but unused ids in `main` [B].
        usable: rows with a fused distribution [B] (bool); the others get the main member's own.
    """
    if len(side.eos):
        given = torch.log_softmax(main.index_select(1, side.eos).float(), dim=1)
        given = given.masked_fill(given.isnan(), -math.log(len(side.eos)))  # uniform if it has none
        out.index_copy_(1, side.eos, given + end[:, None])
    out.index_copy_(1, side.control, main.index_select(1, side.control).float() - total[:, None])
    out.index_fill_(1, side.unused, NEG_INF)
    if not bool(usable.all()):
        own = main.to(torch.float32, copy=True).index_fill_(1, side.unused, NEG_INF)
        out.copy_(torch.where(usable[:, None], out, own - total[:, None]))


def _mean(share: Tensor, log_mass: Tensor) -> Tensor:
    """Return the weighted mean [b] of log masses [b, M]."""
    return (share * log_mass.masked_fill(log_mass == NEG_INF, math.log(FLOOR))).sum(1)
