"""``sampling: member``: a member is drawn, then its token; the law of the texts is that of the fused distribution."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import replace
from types import SimpleNamespace

import naive
import pytest
import torch
from harness import requests
from scipy.stats import chi2

from lm_eval_deepen.engine.covers import plans_of
from lm_eval_deepen.engine.drafts import Drafter
from lm_eval_deepen.engine.following import BatchRow, Follower
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.sampling_by_turns import TurnDecoder
from lm_eval_deepen.engine.texts import Texts
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.relative.matrix import SparseMatrix

CONTEXT = "The quick brown fox"
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "until": []}
LINEAR = {"average": "linear", "weighting": "uniform", "covers": "off"}
METHODS = {
    "canonical": LINEAR,
    "prefix": {**LINEAR, "rows": "prefix"},
    "gac": {"method": "gac"},
    "mined": {"method": "mined"},
}
TRIO = ("padded", "bytelevel", "metaspace")
SAMPLES = 1000


@pytest.fixture(scope="module")
def make(pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))

    def make(names, **options):
        """Return an ensemble of sharp members, so that texts of some pieces come often enough to be counted."""
        members = [
            {"name": f"m{i}", "pretrained": str(pico[name]), "temperature": 0.5, **options.pop(f"m{i}", {})}
            for i, name in enumerate(names)
        ]
        options = {"matrix_dir": folder, "sampling": "member", "batch_size": 64, "self_check": False, **options}
        return DeepenLM(members[0]["pretrained"], members=members, device="cpu", **options)

    return make


@pytest.fixture(scope="module")
def pair(make):
    return make(("bytelevel", "metaspace"), **LINEAR)


def ask(model, *pairs):
    return model.generate_until(requests("generate_until", *pairs), disable_tqdm=True)


def written(model, length, contexts, kind=TurnDecoder, batch=64, **settings):
    """Return the finished texts of some prompts, in their order."""
    texts, repeats = Texts(model.ensemble), Counter()
    asked = {**SAMPLED, "max_gen_toks": length, **settings}
    jobs = [texts.job(context, asked, repeats)[0] for context in contexts]
    found = dict(generate(model.ensemble, jobs, batch, None, kind))
    return [found[at] for at in range(len(jobs))]


def sampled(model, length, count):
    """Return the pieces of `count` texts of one prompt, ends of text among them."""
    torch.manual_seed(5)
    texts = written(model, length, [CONTEXT] * count)
    return [(*text.ids, *([] if text.end is None else [text.end])) for text in texts]


def of_two(model, row, likeliest=10):
    """Return the probabilities of the likeliest texts of up to two pieces, from the row [K] after some pieces."""
    cells = {}
    first = row(()).double().exp()
    for token in first.topk(likeliest).indices.tolist():
        if token in model.ensemble.main.eos_ids:
            cells[token,] = float(first[token])
            continue
        second = row((token,)).double().exp()
        for after in second.topk(likeliest).indices.tolist():
            cells[token, after] = float(first[token] * second[after])
    return cells


def p_value(cells, texts):
    """Return how probable so large a chi-square is; likely cells stand alone, the others together."""
    counts = Counter(texts)
    likely = {cell: mass * len(texts) for cell, mass in cells.items() if mass * len(texts) >= 5}
    assert len(likely) > 12, "a test of few cells tells nothing"
    rest = len(texts) - sum(likely.values())
    other = len(texts) - sum(counts[cell] for cell in likely)
    statistic = sum((counts[cell] - mean) ** 2 / mean for cell, mean in likely.items()) + (other - rest) ** 2 / rest
    return float(chi2.sf(statistic, len(likely)))


def fused_after(model):
    """Return a function from pieces to the fused row after them, by plain forward passes."""
    ensemble = model.ensemble
    prompts = Texts(ensemble).prompter.prompts(CONTEXT, 2)

    def row(pieces):
        data = b"".join(ensemble.fuser.out_vocab.pieces[piece] for piece in pieces)
        if ensemble.is_own(pieces):
            return naive.fused_row(ensemble, prompts, pieces, data)
        main = replace(prompts[0], ids=ensemble.main.codec.follow(prompts[0], data))
        return naive.fused_row(ensemble, (main, *prompts[1:]), (), data)

    return row


def summed(events, logp, weights):
    """Return the distribution [K] of one piece that is drawn by turns, by summing over all draws."""
    main = torch.zeros(len(events.pieces), dtype=torch.float64)
    control = torch.zeros(len(main), dtype=torch.bool)
    control[events.control] = True
    kept = control.clone()
    kept[: len(logp[0])] |= events.of[0] >= 0
    main[: len(logp[0])] = logp[0].double().exp()
    main = torch.where(kept, main, 0.0) / main[kept].sum()
    event_of = torch.full((len(main),), -1)
    event_of[: len(logp[0])] = events.of[0]

    drawn = torch.zeros(len(events.first), dtype=torch.float64)
    for own, of, weight in zip(logp, events.of, weights, strict=True):
        mass = own.double().exp()[of >= 0]
        drawn.index_add_(0, of[of >= 0], weight * mass / mass.sum())
    stands = events.first >= 0
    again = stands & (torch.arange(len(drawn)) != (-1 if events.end is None else events.end))
    lost = drawn[~stands].sum()
    drawn = torch.where(again, drawn * (1 + lost / drawn[again].sum()), torch.where(stands, drawn, 0.0))

    out = torch.where(control, main, 0.0)
    for event in drawn.nonzero()[:, 0].tolist():
        inside = torch.where(event_of == event, main, 0.0)
        if not bool((event_of == event).any()):
            inside[events.first[event]] = 1
        out += (1 - main[control].sum()) * drawn[event] * inside / inside.sum()
    return out


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_piece_drawn_by_turns_has_its_fused_probability(make, options):
    """All draws are summed up: control pieces, the pieces of every event, and text that the main member lacks."""
    ensemble = make(TRIO, **options).ensemble
    fuser, generator = ensemble.fuser, torch.Generator().manual_seed(1)
    logp = [torch.log_softmax(3 * torch.randn(1, m.vocab_size, generator=generator), -1) for m in ensemble.members]
    rows, weights = [row[0] for row in logp], torch.tensor([[0.5, 0.3, 0.2]])
    for lost in (False, True):
        if lost:
            lose_half(fuser)
        events, fused = fuser.events(), fuser.fuse(logp, weights).logp[0].double().exp()
        assert float((fused - summed(events, rows, [0.5, 0.3, 0.2])).abs().max()) < 2e-6
        assert float((fused - summed(events, rows, [0.3, 0.5, 0.2])).abs().max()) > 1e-3
        assert bool((events.first[torch.cat([of[of >= 0] for of in events.of])] < 0).any()) == lost


def lose_half(fuser):
    """Take from half of the second member's text its counterpart."""
    placed = fuser._placed[torch.device("cpu")]
    by_anchors = hasattr(placed[0], "matrix")
    matrix = placed[1].matrix if by_anchors else placed[1][0]
    gone = (torch.arange(len(matrix.values)) % 2 == 0)[:, None]
    if by_anchors:  # the last column is that of pieces without an anchor
        assert not bool((placed[0].matrix.indices[placed[0].mask == 0] == matrix.num_anchors - 1).any())
        indices = torch.where(gone, matrix.num_anchors - 1, matrix.indices)
        changed = SparseMatrix(matrix.values, indices, matrix.num_anchors, matrix.dropped_mass)
        placed = (placed[0], replace(placed[1], matrix=changed), *placed[2:])
    else:
        values = torch.where(gone, 0.0, matrix.values)
        changed = SparseMatrix(values, matrix.indices, matrix.num_anchors, gone[:, 0].float())
        placed = (placed[0], (changed, *placed[1][1:]))
    fuser._placed = {torch.device("cpu"): placed}


@pytest.mark.parametrize(
    ("names", "method"),
    [(("metaspace", "padded"), "gac"), (TRIO, "mined"), (("bytelevel", "metaspace"), "few anchors")],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_texts_have_the_law_of_the_fused_distribution(make, names, method, monkeypatch):
    model = make(names, **METHODS.get(method, {**LINEAR, "max_anchors": 60}))
    cells = of_two(model, fused_after(model))
    assert p_value(cells, sampled(model, 2, SAMPLES)) > 1e-3
    if method == "few anchors":  # nobody asks the main member what it makes of a proposal
        monkeypatch.setattr(TurnDecoder, "_decided", lambda self, row, proposal, logp: proposal.piece)
        assert p_value(cells, sampled(model, 2, SAMPLES)) < 1e-6


def test_the_chi_square_tells_other_weights(pair):
    ensemble = pair.ensemble
    cells = of_two(pair, fused_after(pair))
    assert p_value(cells, sampled(pair, 2, SAMPLES)) > 1e-3
    even, ensemble.weights = ensemble.weights, torch.tensor([0.3, 0.7])
    try:
        assert p_value(cells, sampled(pair, 2, SAMPLES)) < 1e-6
    finally:
        ensemble.weights = even


def by_stretches(model, expert):
    """Return a function from texts to the probabilities of what one expert writes next, None for an end."""
    ensemble = model.ensemble
    prompts = Texts(ensemble).prompter.prompts(CONTEXT, 2)
    weights, power = ensemble.experts.weights[expert], ensemble.experts.power[expert]

    def after(text):
        found = Counter()
        for member, prompt, weight in zip(ensemble.members, prompts, weights.tolist(), strict=True):
            vocab = member.codec.vocab.events
            logp = naive.member_logp(member, member.codec.follow(prompt, text))[0].double() * power
            apart = (vocab.control | vocab.unused) - set(vocab.eos)
            logp[sorted(apart)] = -torch.inf
            for token, mass in enumerate(torch.softmax(logp, 0).tolist()):
                if mass:
                    found[None if token in vocab.eos else vocab.pieces[token]] += weight * mass
        return found

    return after


@pytest.mark.parametrize("names", [("bytelevel", "metaspace"), ("metaspace", "bytelevel")], ids="+".join)
def test_mixture_writes_without_a_main_member(make, names):
    """The law is summed over the experts, each of which stands for a whole text; it is the same in both orders."""
    model = make(names, method="mixture")
    experts = model.ensemble.experts
    cells = Counter()
    for expert, prior in enumerate(experts.log_prior.exp().tolist()):
        after = by_stretches(model, expert)
        first = after(b"")
        for piece, _ in first.most_common(25):
            if piece is None:
                cells[None,] += prior * first[None]
                continue
            for second, mass in after(piece).items():
                cells[piece, second] += prior * first[piece] * mass
    torch.manual_seed(9)
    pieces = model.ensemble.turn_events.pieces
    texts = [
        (*(pieces[piece] for piece in text.ids), *([] if text.end is None else [None]))
        for text in written(model, 2, [CONTEXT] * SAMPLES)
    ]
    assert p_value(dict(cells.most_common(60)), texts) > 1e-3


def test_every_distribution_is_read_once(make, pair, monkeypatch):
    """Another member is read where its turn is, the main member everywhere; without a main member, one is read."""
    read = Counter()
    monkeypatch.setattr(
        "lm_eval_deepen.engine.sampling_by_turns.check_row", lambda member, logp: read.update({member.name: len(logp)})
    )
    contexts, length = [CONTEXT, "café", "a b", "The dog"], 12
    monkeypatch.setattr(Follower, "follow_covered", None)  # `mixture` has no main member whose tokens could be covered
    for model in (pair, make(("bytelevel", "metaspace"), method="mixture", covers="on")):
        read.clear()
        model.ensemble.counters.turns.clear()
        before = [member.runner.forwarded for member in model.ensemble.members]
        texts = written(model, length, contexts)
        turns = model.get_model_info()["deepen"]["sampled_by_turns"]
        forwarded = [m.runner.forwarded - old for m, old in zip(model.ensemble.members, before, strict=True)]
        steps = sum(len(text.ids) + (text.end is not None) for text in texts)
        assert 5 < turns["m1"] <= read["m1"] <= turns["m1"] + 8, "turns that were taken back are read, too"
        if model is pair:
            assert steps <= read["m0"] <= steps + 8, "pieces that fell are read again"
        else:
            assert read["m0"] + read["m1"] == steps
        # every member takes in every token at most once, but for words that are cut anew
        assert all(tokens <= 1.5 * (steps + 40) for tokens in forwarded)


def test_texts_depend_on_the_seed_and_the_prompt_alone(make, pair):
    contexts = ["The quick brown fox", "café", "a b", CONTEXT]
    for model in (pair, make(("metaspace", "padded"), method="mixture")):
        torch.manual_seed(3)
        found = [text.ids for text in written(model, 10, contexts)]
        assert [text.ids for text in written(model, 10, contexts, batch=3)] == found
        assert [text.ids for text in written(model, 10, contexts[:3])] == found[:3]
        assert written(model, 10, contexts[1:2])[0].ids == found[1]
        assert found[0] != found[3], "samples of one prompt differ"
        torch.manual_seed(4)
        assert [text.ids for text in written(model, 10, contexts)] != found


def test_the_main_member_decides_whatever_it_excludes(make, monkeypatch):
    """Control pieces that are certain, ends and texts to which it gives nothing: as in the fused distribution."""
    ensemble = make(("padded", "bytelevel"), **LINEAR).ensemble
    decoder, seen = TurnDecoder(ensemble, deque(), 1, Drafter()), []
    monkeypatch.setattr(decoder, "_pick", lambda row, scores: seen.append(torch.softmax(scores, 0)) or 0)
    events, ends = decoder.events, list(ensemble.main.eos_ids)
    control, text = (
        events.control.tolist(),
        next(token for token, event in enumerate(events.of[0]) if 0 <= event < events.end),
    )
    fused = ensemble.fuser.fuse
    for certain, event, excluded in [
        (control, int(events.of[0][text]), []),
        ([text], events.end, ends),
        ([control[0], text], events.end, ends),
    ]:
        logits = torch.randn(ensemble.main.vocab_size, generator=torch.Generator().manual_seed(2))
        logits[certain] += 60
        logits[excluded] = -torch.inf
        logp = torch.log_softmax(logits, 0)
        decoder._decided(None, SimpleNamespace(piece=0, event=event), logp)
        apart = fused([logp[None], torch.zeros(1, ensemble.members[1].vocab_size)], torch.tensor([[0.5, 0.5]])).logp
        size = len(control)
        torch.testing.assert_close(seen[-1][:size], apart[0, control].exp(), atol=1e-6, rtol=1e-5)
        if excluded:
            torch.testing.assert_close(seen[-1][size:] / seen[-1][size:].sum(), torch.tensor([0.5, 0.5]))
    logp[text] = -torch.inf
    twins = events.of[0] == events.of[0][text]
    logp[twins] = -torch.inf
    assert decoder._decided(None, SimpleNamespace(piece=text, event=int(events.of[0][text])), logp) == -1


@pytest.mark.parametrize("instead", [7, -1])
def test_a_text_that_goes_back_forgets_what_was_drawn_behind(pair, monkeypatch, instead):
    """Where a piece falls, an end of text may be drawn again; where nothing stands in its place, text alone."""
    decoder, wrote = TurnDecoder(pair.ensemble, deque(), 1, Drafter()), []
    monkeypatch.setattr(decoder, "_decided", lambda row, proposal, logp: instead)
    monkeypatch.setattr(decoder, "_write", lambda row, turn, piece: wrote.append(piece))
    row = BatchRow(0, Texts(pair.ensemble).job(CONTEXT, {**SAMPLED, "max_gen_toks": 2}, Counter())[0])
    row.out.ids, row.out.logp, row.out.data = [5, 6], [0.0, 0.0], b"ab"
    proposal = SimpleNamespace(piece=6, event=6, path=(), pieces=1, size=1)
    turn = SimpleNamespace(proposals=[proposal], member=0, reason="", text_only=True, alone=False, paths=(), draws={})
    decoder.turns[0] = turn
    decoder._take_turn(row, 0, torch.zeros(1, pair.ensemble.main.vocab_size))
    assert (turn.text_only, wrote) == (instead < 0, [7] if instead > 0 else [])
    assert (turn.proposals, turn.member, row.out.ids, row.out.data) == ([], None, [5], b"a")


@pytest.mark.parametrize("method", ["canonical", "mixture"])
def test_what_was_taken_back_is_not_counted(make, monkeypatch, method):
    """Each step of a text has one turn, and one count of who abstained, however often it was drawn."""
    options = METHODS.get(method, {"method": "mixture", "weights": [0.5, 0.5]})
    model = make(("bytelevel", "metaspace"), m1={"max_length": 16}, **options)
    fell, decided = [], TurnDecoder._decided

    def undecided(self, row, proposal, logp):
        if len(fell) < 40 and proposal.pieces % 3 == 2:
            fell.append(proposal)
            return -1 if len(fell) % 2 else proposal.piece + 1
        return decided(self, row, proposal, logp)

    monkeypatch.setattr(TurnDecoder, "_decided", undecided)
    torch.manual_seed(3)
    texts = written(model, 24, ["The dog", "walk", "a b"])
    assert bool(fell) is (method == "canonical")
    places = [place for text in texts for place in range(len(text.ids) + (text.end is not None))]
    counts = model.get_model_info()["deepen"]
    assert sum(counts["sampled_by_turns"].values()) == len(places)
    beyond = counts["steps_beyond_context"]["m1"]
    assert 0 < beyond == counts["steps_sat_out"]["m1"] < len(places) - counts["sampled_by_turns"]["m1"] + 1


def likelier_ends(model):
    """Let every member end a text after about a dozen tokens."""
    for member in model.ensemble.members:
        ends = list(member.eos_ids)

        def raised(module, inputs, logits, ends=ends):
            logits[..., ends] = logits.amax(-1, keepdim=True) - 1.5
            return logits

        member.lm.model.get_output_embeddings().register_forward_hook(raised)


def test_texts_end_where_they_are_asked_to(make):
    contexts = ["The quick brown fox", "café", "a b", "The dog", "walk"] * 4
    for options in ({"method": "mixture"}, LINEAR):
        model = make(("bytelevel", "metaspace"), **options)
        likelier_ends(model)
        torch.manual_seed(1)
        free = written(model, 14, contexts)
        torch.manual_seed(1)
        stopped = written(model, 14, contexts, until=["e"])
        assert {text.reason for text in free} == {"eos", "length"}
        assert {text.reason for text in stopped} == {"eos", "length", "stop"}
        for whole, text in zip(free, stopped, strict=True):
            assert (text.reason == "stop") == (b"e" in text.data)
            assert (whole.end is not None) == (whole.reason == "eos")
            assert len(whole.logp) == len(whole.ids) <= 14 and (whole.reason == "eos" or len(whole.ids) == 14)
            if options is not LINEAR:  # whose last pieces are read again in other steps
                assert whole.data.startswith(text.data), "what ends a text changes nothing before"


@pytest.mark.parametrize("method", ["canonical", "mixture"])
def test_a_member_without_room_is_not_drawn(make, method):
    options = METHODS.get(method, {"method": "mixture", "weights": [0.5, 0.5]})
    model = make(("bytelevel", "metaspace"), m1={"max_length": 12}, **options)
    (text,) = written(model, 30, [CONTEXT])
    assert len(text.ids) == 30 or text.reason == "eos"
    counts = model.get_model_info()["deepen"]
    assert counts["steps_sat_out"]["m1"] == counts["steps_beyond_context"]["m1"] > 0


def test_covers_are_read_as_in_every_step(make):
    model = make(("bytelevel", "metaspace"), **{**LINEAR, "covers": "on"})
    seen = []

    class Watched(TurnDecoder):
        def _take_turn(self, row, m, logp):
            if m:
                seen.append((row.job, self.turns[row.index].paths, logp[-1].clone()))
            super()._take_turn(row, m, logp)

    written(model, 12, [CONTEXT, "The dog", "walk", "talking and"], Watched)
    covered = 0
    for job, paths, logp in seen:
        plan = plans_of(model.ensemble.covers, paths, len(job.prompts[0].ids))[1]
        follower = Follower(model.ensemble, 1)
        follower.prefill([job.prompts[1]])
        follower.admit([0])
        (expected,) = follower.follow_covered([[paths[1]]], [[plan]])
        torch.testing.assert_close(logp, expected, atol=1e-4, rtol=1e-4)
        covered += plan is not None and len(plan.covers) > 0
    assert covered > 3


def test_what_cannot_be_sampled_by_turns_is_sampled_as_before_and_told_once(make, caplog):
    geometric, asked = {"average": "geometric", "weighting": "uniform", "covers": "off"}, {**SAMPLED, "max_gen_toks": 5}
    names = ("bytelevel", "metaspace")
    for options, settings in (
        (geometric, {}),
        (LINEAR, {"temperature": 0.7}),
        (LINEAR, {"top_k": 5}),
        ({**LINEAR, "skip_when": "agree"}, {}),
        ({"covers": "off"}, {}),  # learns from steps
        ({"method": "gac", "weighting": "confidence"}, {}),
        ({"method": "gac", "threshold": 0.9}, {}),
    ):
        model = make(names, **options)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            torch.manual_seed(2)
            texts = ask(model, (CONTEXT, {**asked, **settings})), ask(model, (CONTEXT, {**asked, **settings}))
        told = [line.getMessage() for line in caplog.records if "sampling=member" in line.getMessage()]
        assert len(told) == 1 and "as with sampling=fused" in told[0]
        torch.manual_seed(2)
        assert texts[0] == ask(make(names, **{**options, "sampling": "fused"}), (CONTEXT, {**asked, **settings}))
    caplog.clear()
    ask(make(names, **LINEAR), (CONTEXT, {"until": [], "max_gen_toks": 3}))  # greedy texts draw nothing
    assert not [line for line in caplog.records if "sampling" in line.getMessage()]


def test_experts_with_linear_averages_are_drawn_for_a_text(make):
    """The mixture of experts is one of whole texts, as that of the weights that learn."""
    model = make(
        ("bytelevel", "metaspace"), covers="off", weighting="bayes", averages="linear", learn_from="continuation"
    )
    base, experts, cells = model.ensemble, model.ensemble.experts, Counter()
    weights, even = experts.weights.float(), base.weights
    for own, prior in zip(weights, experts.log_prior.exp().tolist(), strict=True):
        base.weights = own
        cells.update({cell: prior * mass for cell, mass in of_two(model, fused_after(model), likeliest=25).items()})
    base.weights = even
    assert p_value(dict(cells.most_common(40)), sampled(model, 2, SAMPLES)) > 1e-3


def test_traces_and_turns_exclude_each_other(make, pair):
    with pytest.raises(ConfigError, match="sampling=member asks one member at a time, and trace=True"):
        make(("bytelevel", "metaspace"), trace=True)
    with pytest.raises(RequestError, match="traced=True wants what all members said"):
        pair.ensemble.generate([CONTEXT], traced=True, **SAMPLED)


def test_a_file_that_is_cut_to_one_member_is_traced(pico, tmp_path):
    file = tmp_path / "pair.yaml"
    file.write_text(f"kind: ensemble\nmembers: [{pico['bytelevel']}, {pico['metaspace']}]\nsampling: member\n")
    cut = DeepenLM(pretrained=str(file), members=str(pico["bytelevel"]), device="cpu")
    assert cut.ensemble.config.sampling == "member" and cut.ensemble.generate([CONTEXT], traced=True, **SAMPLED)


@pytest.mark.parametrize(
    ("silent", "options"),
    [(1, LINEAR), (0, {"method": "mixture", "weights": [0.5, 0.5]}), (1, {"method": "mixture", "weighting": "bayes"})],
    ids=["deepen", "mixture, the first", "mixture that learns"],
)
def test_a_member_that_gives_control_pieces_alone_leaves_its_turns_to_the_others(make, silent, options):
    model = make(("bytelevel", "metaspace"), **options)
    member = model.ensemble.members[silent]
    plain, text = member.runner.logits, torch.ones(member.vocab_size, dtype=torch.bool)
    text[list(member.codec.vocab.control - set(member.codec.vocab.eos))] = False
    text[list(member.codec.vocab.eos)] = True
    member.runner.logits = lambda states: plain(states).masked_fill(text, -torch.inf)
    torch.manual_seed(3)
    texts = written(model, 4, [CONTEXT] * 8)
    assert all(text.reason in ("length", "eos") for text in texts) and any(text.ids for text in texts)
    steps = sum(len(text.ids) + (text.end is not None) for text in texts)
    assert model.ensemble.counters.turns == {f"m{1 - silent}": steps}  # it was drawn, and the other one instead
