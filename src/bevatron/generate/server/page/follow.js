// The page follows an answer as it grows, until the reader scrolls up; it follows again when the reader
// comes back to the end or asks for it.

const NEAR = 48; // pixels that still count as the end

export class Follow {
  constructor(scroller, button) {
    this.scroller = scroller;
    this.button = button;
    this.on = true;
    this.top = 0;
    scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    // A wheel turned up must win against an answer that pulls down in the same frame.
    scroller.addEventListener("wheel", (event) => event.deltaY < 0 && this.pause(), { passive: true });
    scroller.addEventListener("touchmove", () => this.far() > NEAR && this.pause(), { passive: true });
    button.addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.grown()).observe(scroller.firstElementChild);
    new ResizeObserver(() => this.grown()).observe(scroller);
  }

  far() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  scrolled() {
    const { scrollTop } = this.scroller;
    if (this.far() <= NEAR) this.on = true;
    else if (scrollTop < this.top) this.on = false;
    this.top = scrollTop;
    this.show();
  }

  pause() {
    if (this.scroller.scrollHeight > this.scroller.clientHeight) this.on = false;
    this.show();
  }

  grown() {
    if (this.on) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.show();
  }

  follow() {
    this.on = true;
    this.grown();
  }

  show() {
    this.button.hidden = this.on || this.far() <= NEAR;
  }
}
