"""Configurations whose fingerprints are frozen: every option, in every spelling a person can give it."""

from __future__ import annotations

from typing import Any

A, B = "org/model-a", "org/model-b"
PAIR: dict[str, Any] = {"pretrained": A, "members": [A, B]}
TRIO: dict[str, Any] = {"pretrained": A, "members": [A, B, "org/model-c"]}


def pair(**keys: Any) -> dict[str, Any]:
    return {**PAIR, **keys}


NLLB = {
    "pretrained": "org/nllb",
    "source_pattern": r"English: (.*)\nGerman:",
    "source_language": "eng_Latn",
    "target_language": "deu_Latn",
}

# As a mapping: what JSON, YAML and simple_evaluate(model_args={...}) give.
MAPPINGS: dict[str, dict[str, Any]] = {
    "one member": {"pretrained": A},
    "one member by members": {"members": [A]},
    "a pair": PAIR,
    "a trio": TRIO,
    "ten members": {"pretrained": "m/0", "members": [f"m/{i}" for i in range(10)], "weights": [0.1] * 10},
    "members as mappings": {
        "members": [
            {"pretrained": A, "weight": 0.6, "dtype": "float32", "name": "first"},
            {"pretrained": B, "weight": 0.4, "temperature": 1.5, "revision": "v2", "hf_kwargs": {"x": [1, {"y": 0}]}},
        ]
    },
    "members mixed": {"members": [A, {"pretrained": B, "temperature": 0.5}], "dtype": "bfloat16"},
    "checkpoints of one model": {"pretrained": A, "members": [{"revision": "step1"}, {"revision": "step2"}, {}]},
    "loading arguments": pair(
        dtype="float32", max_length=128, trust_remote_code=True, add_bos_token=True,
        chat_template_args={"a": [1, 2], "b": {"c": None}}, attn_implementation="eager", gguf_file="x.gguf",
    ),
    "placement arguments": pair(device="cpu", device_map="auto", parallelize=True, token="secret", cache_dir="x"),
    "from_pretrained arguments": pair(
        variant="fp16", use_safetensors=True, load_in_8bit=False, quantization_config={"bits": 4},
    ),
    "hf_kwargs": pair(hf_kwargs={"anything": 1, "nested": {"b": [1.5, "x"], "a": None}}),
    "an encoder-decoder member": {"members": [A, NLLB]},
    "weights": pair(weights=[0.6, 0.4]),
    "weights, all on the main member": pair(weights=[1, 0]),
    "weights within tolerance": pair(weights=[0.5001, 0.5]),
    "weights as text": pair(weights=["0.25", "0.75"]),
    "weights, a third each": {**TRIO, "weights": [0.33333, 0.33333, 0.33333]},
    "seed": pair(seed=7),
    "chat fallback": pair(chat_fallback="plain"),
    "batch sizes": pair(batch_size=8, max_batch_size=16),
    "batch size auto": pair(batch_size="auto"),
    "batch size auto:N": pair(batch_size="auto:2.5"),
    "matrix folder": pair(matrix_dir="matrices/here"),
    "speculate lookup": pair(speculate="lookup"),
    "speculate draft": pair(speculate="draft"),
    "speculate off as YAML reads it": pair(speculate=False),
    "skip agree": pair(skip_when="agree"),
    "skip confident": pair(skip_when="confident"),
    "skip confident above": pair(skip_when="confident", skip_above=0.5, skip_check=True),
    "no self-check": pair(self_check=False),
    "evidence": pair(evidence={"objective": "bpb", "systems": [{"bits": 1.5}]}),
    "nothing is what None says": pair(weights=None, method=None, compat=None, dtype=None, batch_size=None),
    # --- deepen
    "deepen": pair(method="deepen"),
    "deepen, one option each": pair(rows="prefix", average="geometric", min_anchors=8, trust_region=0.25),
    "deepen, rows embedding": pair(rows="embedding"),
    "deepen, rows exact": pair(rows="exact", embeddings="output"),
    "deepen, embedding in full": pair(
        rows="embedding", embeddings="input", normalization="cosine", relative_temperature=50, top_m=32, inverse="em",
        steps=7, max_anchors=500, anchor_seed=3, min_anchors=20, support=0.99, max_support=256, max_truncated=0.05,
        eos="reference", average="linear",
    ),
    "deepen, entropy": pair(rows="embedding", row_entropy=2, normalization="decorrelated"),
    "deepen, adamw": pair(rows="embedding", inverse="adamw", learning_rate=0.1, steps=3),
    "deepen, adamw of bytes": pair(inverse="adamw", learning_rate="1e-3"),
    "deepen, mirror": pair(inverse="mirror", learning_rate=2),
    "deepen, exact": pair(inverse="exact", rows="canonical"),
    "deepen, support of pieces": pair(support=64),
    "deepen, support as the command line gives it": pair(support=64.0, inverse="em", steps=5.0, top_m=None),
    "deepen, support full": pair(rows="embedding", support="full"),
    "deepen, support share": pair(support=0.999, max_truncated=1),
    "deepen, dense": pair(rows="embedding", top_m=0, max_anchors=1000),
    "deepen, numbers as text": pair(rows="embedding", relative_temperature="1e2", steps="6", support="0.9", top_m="8"),
    "deepen, reference": pair(compat="reference"),
    "deepen, reference and what it leaves open": pair(
        compat="reference", learning_rate=0.15, max_anchors=5000, anchor_seed=1, steps=5, trust_region=1
    ),
    # --- the others
    "adafuse": pair(method="adafuse", threshold=0.5, candidates=2, words=1),
    "gac": pair(method="gac"),
    "gac, threshold": pair(method="gac", threshold=0.5),
    "gac, threshold of one": pair(method="gac", threshold=1),
    "eva": pair(method="eva"),
    "eva in full": pair(method="eva", neighbours=5, similarity_floor=0, filter_top=20),
    "mined": pair(method="mined"),
    "unite": pair(method="unite"),
    "unite in full": pair(method="unite", top_k=20, tail="none"),
    "unite, reference": pair(method="unite", compat="reference"),
    # --- weightings
    "uniform": pair(weighting="uniform"),
    "explicit": pair(weighting="explicit", weights=[0.7, 0.3]),
    "adaptive": pair(weighting="adaptive", dev_scores=[0.2, 0.6]),
    "adaptive, one of three at zero": {**TRIO, "weighting": "adaptive", "dev_scores": [1, 0, "3"]},
    "perplexity": pair(weighting="perplexity"),
    "perplexity in full": pair(weighting="perplexity", loss_temperature=2, loss_per="byte"),
    "confidence": pair(weighting="confidence"),
    "confidence in full": pair(weighting="confidence", entropy_temperature=0.5, weights=[0.9, 0.1], method="gac"),
    # --- poolings
    "vote": pair(pooling="vote"),
    "vote in full": pair(pooling="vote", answer_pattern=r"#### (\d+)", weights=[0.9, 0.1]),
    "vote with the fused ensemble": pair(pooling="vote", with_fused=True, method="gac", threshold=0.25),
    "mbr": pair(pooling="mbr"),
    "mbr in full": pair(pooling="mbr", utility="f1", with_fused=True, rows="prefix"),
    "logp-mean": pair(pooling="logp-mean"),
    "logp-mean, adaptive": pair(pooling="logp-mean", weighting="adaptive", dev_scores=[0.2, 0.7]),
    "vote in the words of the paper": pair(pooling="vote", with_fused=True, compat="reference"),
}  # fmt: skip

# As one writes them after --model_args, or in a call from Python.
INLINE: dict[str, str] = {
    "one member": f"pretrained={A}",
    "a pair": f"pretrained={A},members={A}+{B}",
    "weights": f"pretrained={A},members={A}+{B},weights=0.6+0.4,dtype=float32,max_length=64",
    "weights in scientific notation": f"members={A}+{B},weights=5e-1+.5",
    "every kind of number": f"members={A}+{B},rows=embedding,steps=7,relative_temperature=1e2,support=64,top_m=8",
    "a share": f"members={A}+{B},support=0.99,max_support=512,seed=3",
    "flags": f"members={A}+{B},self_check=false,skip_when=confident,skip_above=0.5,skip_check=True",
    "scores": f"members={A}+{B},weighting=adaptive,dev_scores=0.2+0.6",
    "vote": f"members={A}+{B},pooling=vote,with_fused=true,batch_size=auto:4",
    "reference": f"members={A}+{B},compat=reference,learning_rate=0.15,device=cpu,batch_size=4",
    "unite": f"members={A}+{B},method=unite,top_k=5,tail=none,speculate=lookup",
}

# As an ensemble file, and what is given beside `pretrained=FILE`.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "a pair": ("members: [org/model-a, org/model-b]\nweights: [0.6, 0.4]\nsteps: 3\ninverse: em\n", {}),
    "members on one line": ("members: org/model-a + org/model-b\n", {}),
    "YAML's own readings": (
        "pretrained: org/model-a\nmembers: [org/model-a, org/model-b]\ninverse: adamw\nlearning_rate: 1e-3\n"
        "speculate: off\nrevision: main\nseed: 010\n",
        {},
    ),
    "with what a recipe says": (
        "title: A pair\ntask: [a, b]\nharness: {apply_chat_template: true}\nexpected: []\nsource: s\nnote: n\n"
        "members:\n  - {pretrained: org/model-a, weight: 0.5}\n  - {pretrained: org/model-b, weight: 0.5}\n"
        "method: gac\nthreshold: 0.5\n",
        {},
    ),
    "weights given beside it": (
        "members: [{pretrained: A, weight: 0.9, dtype: float16}, {pretrained: B, weight: 0.1}]\nsteps: 3\n"
        "inverse: em\ndtype: float32\n",
        {"weights": "0.5+0.5", "steps": 4, "dtype": "bfloat16"},
    ),
    "members given beside it": ("pretrained: A\nmembers: [A, B]\nseed: 3\n", {"members": "C+D"}),
    "method given beside it": ("members: [A, B]\nmethod: gac\n", {"method": "unite", "top_k": 3}),
}

# Options of `deepen` whose relative matrices are frozen by name.
MATRICES: dict[str, dict[str, Any]] = {
    "canonical": {},
    "prefix": {"rows": "prefix"},
    "as published": {
        "rows": "embedding", "normalization": "reference", "relative_temperature": 100.0, "top_m": 0,
        "eos": "reference", "embeddings": "input",
    },
    "embedding": {"rows": "embedding"},
    "embedding, cosine": {"rows": "embedding", "normalization": "cosine", "relative_temperature": 50.0, "top_m": 8},
    "embedding, decorrelated": {"rows": "embedding", "normalization": "decorrelated", "row_entropy": 2.0},
    "exact": {"rows": "exact"},
    "exact, output": {"rows": "exact", "embeddings": "output"},
    "a subset of anchors": {"max_anchors": 20, "anchor_seed": 5, "rows": "embedding"},
}  # fmt: skip
