"""The mathematics of K-FAC: torch only; no Ray, gRPC, threads, clock or environment.

Read in this order: `registration` (what has which block), `compute` (sums over cases: loss,
gradient, Fisher products) and `statistics_pass` (curvature statistics: `capture` observes the
layers, `layer_rules` bring them to one normal form, `site_sums` add up), `factors` (running
averages), `inverse` (damped inverses), `precondition` (directions), `step_rule` and `update`
(step, momentum, damping, gamma). Then `structure`: the block-tridiagonal inverse (`tridiagonal`,
`kronecker_sum`) and EKFAC (`eigenbasis`) beside the block-diagonal one. The README beside this
file has the notation.
"""
