"""An ensemble from Python, cell by cell: next pieces, texts, scores, and who decided each token.

python examples/notebook.py MODEL MODEL
"""

# %% Load an ensemble: the main member comes first. `configure` takes the keys of --model_args, or a YAML file.
import sys

from lm_eval_deepen import Ensemble, configure

models = sys.argv[1:]
ensemble = Ensemble.load(configure({"pretrained": models[0], "members": models, "batch_size": 2}), "cpu")

# %% What comes next? `logp` [K] has the natural-log probability of each piece in `pieces` [K].
following = ensemble.next_logp("The capital of France is")
for piece, probability in following.likeliest(3):
    print(f"{piece!r:12} {probability:.3f}")

# %% Generate texts together, as a task's generate_until does.
for found in ensemble.generate(["The dog", "Question: 1 + 1?\nAnswer:"], until=["\n"], max_gen_toks=12):
    print(f"{found.prompt!r} -> {found.text!r} ({found.reason}, {sum(found.logp):.2f} nats)")

# %% Which continuation is likelier? The scores are those of loglikelihood.
choices = ensemble.score("The capital of France is", [" Paris", " Rome", " Sofia"])
best = max(choices, key=lambda choice: choice.logp)
print(f"likeliest: {best.text!r} with {best.logp:.2f} nats")

# %% Who decided? A trace has every member's five likeliest pieces at every token.
traced = ensemble.trace("The dog did not mind.")
for step in traced.steps:
    said = ", ".join(f"{member.name}: {member.top[0][0].data!r}" for member in step.members if member.top)
    print(f"{step.piece.data!r:10} {step.logp:7.2f} nats  changed: {step.changed!s:5}  {said}")
print(f"score of the text: {traced.logp:.2f} nats")
