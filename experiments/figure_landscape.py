"""Test error on the plane through the anchor, a model and the centre.

Claim: the centre has the lowest error around, and the merge of two models is
nearer to it than either of them, or than their average.

  python experiments/figure_landscape.py --workdir=runs/figures

writes analysis/landscape.json and plots/landscape*.svg and .png into the
workdir, after training the models of `study.py` if they are not there.
"""

import study

if __name__ == '__main__':
  study.draw('landscape', __doc__ or '')
