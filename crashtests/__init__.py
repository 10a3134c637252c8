"""The crash tests of kvwal: prove the contract, and prove with mutants that they could disprove it.

Run with `python -m crashtests`; docs/crash-testing.md says what the parts do.
"""
