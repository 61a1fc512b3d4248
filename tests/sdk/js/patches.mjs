// Applies patches as centrifuge-js does: reads [base, patch] pairs, text or base 64, as one JSON array from standard
// input, and prints what became of each: `node patches.mjs json|protobuf`.
//
// The SDK exports its decoder nowhere, so this asks the part of it that every publication goes through.
import { text } from "node:stream/consumers";

const binary = process.argv[2] === "protobuf";
const { Centrifuge } = await import(binary ? "centrifuge/build/protobuf" : "centrifuge");
const codec = new Centrifuge("ws://127.0.0.1")._codec;

const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const made = ([base, patch]) => {
  const publication = { delta: true, data: binary ? bytes(patch) : patch };
  const { newPrevValue } = codec.applyDeltaIfNeeded(publication, bytes(base));
  return Buffer.from(newPrevValue).toString("base64");
};
console.log(JSON.stringify(JSON.parse(await text(process.stdin)).map(made)));
