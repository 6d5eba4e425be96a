// Search in pages that are opened as files: browsers refuse workers there, so the worker's script runs in a hidden frame.
// The search asks for a class of this name in `parent`, for `importScripts` that returns a promise, and finds its own
// address in the first script element of the frame.
(function () {
  "use strict";
  if (location.protocol !== "file:") return;

  class FrameWorker extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.frame = frame;
      const inside = frame.contentWindow;
      const load = function (source) {
        return new Promise(function (done, failed) {
          const script = inside.document.createElement("script");
          script.src = source;
          script.onload = done;
          script.onerror = failed;
          inside.document.body.append(script);
        });
      };
      inside.importScripts = async function (...sources) { for (const source of sources) await load(source); };
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) }));
      this.ready = load(address);
    }
    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(function () { inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) })); });
    }
    terminate() { this.frame.remove(); }
  }
  window.Worker = window.IFrameWorker = FrameWorker;
})();
