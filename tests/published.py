"""What was published, typed from the pictures and tables: recipes are compared with this, not with each other."""

MODELS = {  # the name in the pictures -> on the hub
    "LLaMA2-13B": "meta-llama/Llama-2-13b-hf",
    "InternLM-20B": "internlm/internlm-20b",
    "Skywork-13B": "Skywork/Skywork-13B-base",
    "TigerBot-13B": "TigerResearch/tigerbot-13b-base-v2",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
    "Yi-6B": "01-ai/Yi-6B",
    "Nanbeige-16B": "Nanbeige/Nanbeige-16B-Base",
    "LLaMA2-70B": "NousResearch/Llama-2-70b-hf",
    "Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1",
    "NLLB-600M": "facebook/nllb-200-distilled-600M",
    "LLaMA2-7B": "meta-llama/Llama-2-7b-hf",
    "OpenLLaMA-7B-v2": "openlm-research/open_llama_7b_v2",
    "MPT-7B": "mosaicml/mpt-7b",
}
COLUMNS = {  # of the main table -> our tasks
    "MMLU": "deepen_mmlu",
    "ARC-C": "deepen_arc_challenge",
    "GSM8K": "deepen_gsm8k",
    "PIQA": "deepen_piqa",
    "TriviaQA": "deepen_triviaqa",
    "NQ": "deepen_nq",
}

# figures/Main_Experiment.jpeg of github.com/OrangeInSouth/DeePEn; the columns in the order above
MAIN_PICTURE = "figures/Main_Experiment.jpeg"
MAIN = {
    "LLaMA2-13B": (55.07, 59.32, 29.80, 59.68, 74.32, 28.67),
    "InternLM-20B": (59.94, 75.81, 53.83, 64.78, 66.88, 26.09),
    "Skywork-13B": (61.16, 66.50, 53.90, 74.04, 58.65, 19.75),
    "TigerBot-13B": (51.95, 57.44, 48.82, 68.28, 66.22, 22.71),
    "Mistral-7B": (62.13, 73.33, 47.50, 65.61, 73.18, 27.62),
    "Yi-6B": (63.25, 73.33, 37.91, 76.15, 59.02, 18.98),
    "Top-2 LLM-Blender": (63.85, 75.73, 54.89, 78.31, 74.10, 28.61),
    "Top-2 MinED": (65.04, 77.35, 18.50, 78.98, 72.30, 28.45),
    "Top-2 DeePEn-Avg": (64.68, 77.52, 55.42, 78.87, 75.90, 30.17),
    "Top-4 LLM-Blender": (61.44, 71.03, 43.37, 71.16, 67.87, 24.18),
    "Top-4 Voting": (64.88, 78.41, 63.15, 76.82, None, None),
    "Top-4 MBR": (None, None, 62.09, None, 74.32, 30.28),
    "Top-4 MinED": (65.61, 78.68, 56.56, 77.87, 71.62, 29.50),
    "Top-4 DeePEn-Avg": (65.09, 78.70, 56.18, 77.15, 75.74, 31.55),
    "Top-4 DeePEn-Adapt": (65.25, 79.15, 56.25, 78.59, 75.76, 31.77),
    "Top-4 DeePEn-Adapt + Voting/MBR": (65.40, 79.44, 65.25, 77.37, 75.65, 32.11),
}
# Members of the main table's ensembles: confs/ of the same repository, the main member first
TOP_2 = {
    "MMLU": ["Yi-6B", "Mistral-7B"],
    "ARC-C": ["InternLM-20B", "Mistral-7B"],
    "GSM8K": ["InternLM-20B", "Skywork-13B"],
    "PIQA": ["Yi-6B", "Skywork-13B"],
    "TriviaQA": ["LLaMA2-13B", "Mistral-7B"],
    "NQ": ["LLaMA2-13B", "Mistral-7B"],
}
TOP_4 = {
    "MMLU": ["Yi-6B", "Mistral-7B", "Skywork-13B", "InternLM-20B"],
    "ARC-C": ["InternLM-20B", "Mistral-7B", "Yi-6B", "Skywork-13B"],
    "GSM8K": ["Skywork-13B", "InternLM-20B", "TigerBot-13B", "Mistral-7B"],
    "PIQA": ["Yi-6B", "Skywork-13B", "TigerBot-13B", "Mistral-7B"],
    "TriviaQA": ["LLaMA2-13B", "Mistral-7B", "InternLM-20B", "TigerBot-13B"],
    "NQ": ["LLaMA2-13B", "Mistral-7B", "InternLM-20B", "TigerBot-13B"],
}

# Members added one by one, DeePEn-Adapt: who is added, and the score with it; the first is a member alone
ONE_BY_ONE_PICTURE = "figures/Multi_model_ensemble.jpg"
ONE_BY_ONE = {
    "MMLU": [
        ("Yi-6B", 63.25), ("Mistral-7B", 64.41), ("Skywork-13B", 65.34), ("Nanbeige-16B", 65.42),
        ("InternLM-20B", 65.73), ("LLaMA2-13B", 65.47), ("TigerBot-13B", 65.14),
    ],
    "PIQA": [
        ("Yi-6B", 76.15), ("Nanbeige-16B", 79.37), ("Skywork-13B", 79.37), ("LLaMA2-70B", 79.53),
        ("Mixtral-8x7B", 80.26), ("TigerBot-13B", 79.81), ("InternLM-20B", 80.03), ("Mistral-7B", 79.87),
        ("LLaMA2-13B", 79.76),
    ],
    "NQ": [
        ("LLaMA2-13B", 28.67), ("Mistral-7B", 30.65), ("InternLM-20B", 31.36), ("TigerBot-13B", 31.77),
        ("Nanbeige-16B", 31.02), ("Skywork-13B", 31.16), ("Yi-6B", 30.50),
    ],
}  # fmt: skip
ONE_BY_ONE_ALONE = {  # further members alone, as this picture has them
    ("Nanbeige-16B", "MMLU"): 60.12,
    ("Nanbeige-16B", "PIQA"): 76.98,
    ("Nanbeige-16B", "NQ"): 22.13,
    ("Skywork-13B", "NQ"): 19.97,  # 19.75 in the main table
    ("Mistral-7B", "PIQA"): 65.5,  # 65.61 in the main table
}

DENSE_SPARSE_PICTURE = "figures/Ensemble_Dense_and_Sparse.png"
DENSE_SPARSE = {  # GSM8K, PIQA
    "LLaMA2-70B": (63.84, 71.27),
    "Mixtral-8x7B": (65.73, 71.88),
    "DeePEn": (67.33, 75.10),
}

TRANSLATOR_PICTURE = "figures/Ensemble_LLM_and_Expert.png"
DIRECTIONS = {  # -> task, language that is read, language that is written, their codes
    "En-De": ("deepen_flores_en_de", "English", "German", "eng_Latn", "deu_Latn"),
    "De-En": ("deepen_flores_de_en", "German", "English", "deu_Latn", "eng_Latn"),
    "En-Ro": ("deepen_flores_en_ro", "English", "Romanian", "eng_Latn", "ron_Latn"),
    "Ro-En": ("deepen_flores_ro_en", "Romanian", "English", "ron_Latn", "eng_Latn"),
}
TRANSLATOR = {  # the directions in the order above
    "LLaMA2-13B": (30.60, 42.27, 30.83, 39.99),
    "NLLB-600M": (32.30, 41.49, 31.91, 42.39),
    "DeePEn": (33.34, 43.70, 32.95, 42.84),
}

ADAFUSE = ("Llama-3.1-8B", "Mistral-7B", "DeePEn", "UniTE", "AdaFuse")
# Tables of others that have a DeePEn row, by recipe: our task -> row -> score, and the source
RIVALS = {
    "rival_unite_table_3": ("arXiv 2410.03777, table 3", ["OpenChat", "Mistral-7B", "DeepSeek-7B"], {
        "deepen_gsm8k": {"OpenChat": 73.46, "DeePEn": 73.06, "GaC": 62.85, "UniTE": 73.31},
        "deepen_piqa": {"OpenChat": 87.10, "DeePEn": 76.04, "GaC": 67.85, "UniTE": 87.50},
        "deepen_mmlu": {"OpenChat": 60.80, "DeePEn": 61.91, "GaC": 55.15, "UniTE": 62.13},
        "deepen_arc_challenge": {"OpenChat": 78.05, "DeePEn": 72.14, "GaC": 73.04, "UniTE": 78.70},
        "deepen_triviaqa": {"OpenChat": 61.77, "DeePEn": 67.24, "GaC": 62.22, "UniTE": 65.80},
        "deepen_nq": {"OpenChat": 31.08, "DeePEn": 28.26, "GaC": 20.72, "UniTE": 31.78},
    }),
    "rival_unite_table_4": ("arXiv 2410.03777, table 4", ["LLaMA3-8B", "Qwen2-7B"], {
        "deepen_gsm8k": {"UniTE": 84.17},
        "deepen_piqa": {"UniTE": 85.53},
        "deepen_arc_challenge": {"UniTE": 85.07},
        "deepen_mmlu": {"UniTE": 69.78},
    }),
    "rival_adafuse": ("arXiv 2601.06022, table 1", ["Llama-3.1-8B", "Mistral-7B"], {
        "deepen_nq": dict(zip(ADAFUSE, (34.24, 32.05, 37.42, 38.95, 42.85), strict=True)),
        "squad_completion": dict(zip(ADAFUSE, (80.13, 83.49, 71.51, 82.17, 90.15), strict=True)),
        "deepen_triviaqa": dict(zip(ADAFUSE, (78.97, 77.27, 73.85, 81.38, 82.17), strict=True)),
        "deepen_gsm8k": dict(zip(ADAFUSE, (81.05, 61.71, 67.63, 64.59, 79.15), strict=True)),
        "deepen_flores_en_de": dict(zip(ADAFUSE, (31.33, 29.99, 37.56, 34.98, 39.83), strict=True)),
        "deepen_flores_de_en": dict(zip(ADAFUSE, (41.78, 40.64, 42.33, 41.67, 45.25), strict=True)),
    }),
    "rival_safe_table_2": ("arXiv 2510.15346, table 2", ["InternLM3", "Qwen2.5"], {
        "mmlu_redux_generative": {"UniTE": 73.39, "UniTE with SAFE": 77.81},
        "minerva_math500": {"UniTE": 59.6, "UniTE with SAFE": 77.4},
        "deepen_gsm8k": {"UniTE": 75.06, "UniTE with SAFE": 92.04},
        "bbh_cot_fewshot": {"UniTE": 79.58, "UniTE with SAFE": 82.97},
        "deepen_arc_challenge": {"UniTE": 87.97, "UniTE with SAFE": 90.78},
    }),
    "rival_lvr": ("arXiv 2510.08102", ["Qwen2.5-3B", "Falcon3-7B"], {
        "deepen_gsm8k": {"Qwen2.5-3B": 79.1, "Falcon3-7B": 77.9},
        "minerva_math500": {"Qwen2.5-3B": 42.4, "Falcon3-7B": 30.2},
    }),
}  # fmt: skip

# FuseLLM (arXiv 2401.10491): target first, sources, and the benchmarks as tasks of the harness
FUSELLM = ["LLaMA2-7B", "OpenLLaMA-7B-v2", "MPT-7B"]
FUSELLM_TASKS = [
    "bbh_cot_fewshot", "arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "triviaqa", "drop",
    "lambada_openai",
]  # fmt: skip
