// The search runs in a worker, which browsers refuse to a page on a disk: there a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []  // what is sent before the script is there
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<!doctype html>"
      frame.onload = () => {
        this.inside = frame.contentWindow
        this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = this.inside.document.createElement("script")
        script.src = new URL(url, document.baseURI)
        script.onload = () => {
          const waiting = this.waiting
          this.waiting = null
          waiting.forEach(data => this.postMessage(data))
        }
        this.inside.document.body.append(script)
      }
      document.body.append(frame)
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
