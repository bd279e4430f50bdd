'use strict';
// A finger has no hover: the title of the point nearest to a tap is shown.
const tip = document.getElementById('tip');

function distance(mark, event) {
  const box = mark.getBoundingClientRect();
  return Math.hypot(box.x + box.width / 2 - event.clientX,
                    box.y + box.height / 2 - event.clientY);
}

addEventListener('pointerdown', (event) => {
  tip.hidden = true;
  const figure = event.target.closest('figure');
  if (event.pointerType === 'mouse' || !figure) return;
  let least = 28;  // pixels
  for (const title of figure.querySelectorAll('svg title')) {
    const far = distance(title.parentNode, event);
    if (far > least) continue;
    least = far;
    tip.textContent = title.textContent;
    tip.hidden = false;
  }
});
