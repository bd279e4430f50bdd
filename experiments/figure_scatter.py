"""Accuracy in distribution against the mean accuracy on shifts.

Claim: Model Stock of two models lies above and to the right of single models,
and of the curves that WiSE-FT draws from the anchor to each of them.

  python experiments/figure_scatter.py --workdir=runs/figures

writes analysis/scatter.json and plots/scatter*.svg and .png into the workdir,
after training the models of `study.py` if they are not there.
"""

import study

if __name__ == '__main__':
  study.draw('scatter', __doc__ or '')
