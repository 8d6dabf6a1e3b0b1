// A page read from disk may not start a worker, and the search runs in one: a hidden frame stands in for it.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inside = frame.contentWindow;
      const sent = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }));
      inside.postMessage = (data) => sent(this, data);
      const script = frame.contentDocument.createElement("script");
      const loaded = new Promise((done, failed) => Object.assign(script, { src: url, onload: done, onerror: failed }));
      frame.contentDocument.body.append(script);
      this.postMessage = (data) => loaded.then(() => sent(inside, data));
      this.terminate = () => frame.remove();
    }
  };
}
