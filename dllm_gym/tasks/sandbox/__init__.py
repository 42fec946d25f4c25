"""Runs generated programs where they can do no harm, and says whether they pass a check."""

from dllm_gym.tasks.sandbox.box import NamespaceSandbox, RlimitSandbox, Sandbox, Verdict, make_sandbox, sandbox_kind

__all__ = ["NamespaceSandbox", "RlimitSandbox", "Sandbox", "Verdict", "make_sandbox", "sandbox_kind"]
