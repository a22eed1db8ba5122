"""The mathematics of K-FAC: torch only; no Ray, gRPC, threads, clock or environment.

Read in this order: `layers` (what has a block), `compute` (sums over cases: loss, gradient,
statistics, Fisher products), `factors` (running averages), `inverse` (damped inverses),
`precondition` (directions), `step_rule` and `update` (step, momentum, damping, gamma). Then
`structure`: the block-tridiagonal inverse (`tridiagonal`, `kronecker_sum`) and EKFAC
(`eigenbasis`) beside the block-diagonal one. The README beside this file has the notation.
"""
