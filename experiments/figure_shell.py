"""Models lie on a thin shell, at right angles around their centre.

Claim: |w_i - mu| is nearly constant, and w_i - mu is orthogonal to w_j - mu and
to w_0 - mu, layer by layer; what follows from it for averages and merges holds.

  python experiments/figure_shell.py --workdir=runs/figures

writes analysis/shell.json and plots/shell*.svg and .png into the workdir,
after training the models of `study.py` if they are not there.
"""

import study

if __name__ == '__main__':
  study.draw('shell', __doc__ or '')
