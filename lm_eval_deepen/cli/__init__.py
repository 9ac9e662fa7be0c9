"""The command ``lm-eval-deepen``: one module per subcommand.

Such a module has ``HELP`` (its description), ``add_arguments(parser)`` and ``run(args) -> int`` (the exit
status), and imports torch and the harness only inside ``run``. `lm_eval_deepen.cli.main` lists it.
"""
