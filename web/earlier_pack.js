// A graph of ComfyUI-nunchaku: once its nodes have been swapped for ours, say what did not go over and which nodes stay. Not
// before: a message would cover the buttons of the swap. The texts are nodes/replacements.py's.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let texts = [];         // about the open graph, until they are said
let opened = 0;         // graphs; an answer about an earlier one is no longer of use

function say() {
    if (!texts.length) return;
    app.extensionManager.toast.add({
        severity: "warn", summary: "This graph was made with ComfyUI-nunchaku", detail: texts.join("\n\n") });
    texts = [];
}

app.registerExtension({
    name: "SVDQ.EarlierPack",
    async beforeConfigureGraph(graph) {
        texts = [];
        const mine = ++opened;
        const graphs = [graph, ...(graph?.definitions?.subgraphs ?? [])];
        const nodes = graphs.flatMap((one) => one?.nodes ?? []).filter((node) => typeof node?.type === "string")
            .map(({ type, widgets_values }) => ({ type, widgets_values }));
        if (!nodes.some((node) => node.type.startsWith("Nunchaku"))) return;
        const answer = await api.fetchApi("/svdq/earlier_pack", {
            method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(nodes) });
        const said = await answer.json();
        if (mine === opened) texts = said;
    },
    nodeCreated(node) {
        if (texts.length && node.comfyClass?.startsWith("SVDQ")) setTimeout(say);
    },
});
