"""Accuracy against the distance from the centre of all models.

Claim: noise around the centre loses accuracy with its distance; averages of N
are R / sqrt(N) away, and Model Stock of N models is nearer than their average.

  python experiments/figure_distance.py --workdir=runs/figures

writes analysis/distance.json and plots/distance*.svg and .png into the workdir,
after training the models of `study.py` if they are not there.
"""

import study

if __name__ == '__main__':
  study.draw('distance', __doc__ or '')
