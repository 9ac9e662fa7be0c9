"""Use an ensemble from Python: the next piece, the score of a text, a harness task.

python examples/from_python.py MODEL MODEL [--task TASK]
"""

from __future__ import annotations

import argparse

import lm_eval

from lm_eval_deepen import DeepenLM, Ensemble, configure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--task", help="a task of the harness to evaluate on two documents")
    arguments = parser.parse_args()

    keys = {"pretrained": arguments.models[0], "members": list(arguments.models)}
    ensemble = Ensemble.load(configure(keys), "cpu")
    ((piece, probability),) = ensemble.next_logp("The capital of France is").likeliest(1)
    print(f"most likely next piece: {piece!r}, probability {probability:.3f}")

    if arguments.task:
        model = DeepenLM(device="cpu", **keys)
        found = lm_eval.simple_evaluate(model=model, tasks=[arguments.task], limit=2)
        print(found["results"])


if __name__ == "__main__":
    main()
