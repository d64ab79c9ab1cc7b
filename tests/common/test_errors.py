"""Kinds of errors."""

import residrop.cli.recipes
from residrop.cli import main
from residrop.common.errors import PlanError, UsageError


def test_a_plan_that_does_not_fit_is_a_mistake_that_a_user_can_mend(monkeypatch, capsys):
    assert issubclass(PlanError, UsageError)
    assert issubclass(PlanError, RuntimeError)  # as it was before

    def refuse(target):
        raise PlanError("the plan has 2 draws, the model 3 rules")

    monkeypatch.setattr(residrop.cli.recipes, "console_for", refuse)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == "residrop: error: the plan has 2 draws, the model 3 rules\n"
