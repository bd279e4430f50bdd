"""Angles and norms of displacements are the same from model to model.

Claim: within a kind of layer, at a depth and at an epoch, the angle between
the displacements of two models and the norm of one hardly depend on which
models they are; biases, norms and the head agree more than matrices do.

  python experiments/figure_consistency.py --workdir=runs/figures

writes analysis/consistency.json and plots/consistency*.svg and .png into the
workdir, after training the models of `study.py` if they are not there.
"""

import study

if __name__ == '__main__':
  study.draw('consistency', __doc__ or '')
