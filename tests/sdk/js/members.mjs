// Prints as JSON what a module exports, by the TypeScript compiler's own reading: `node members.mjs FILE`.  Types aside:
// for a class its public members, for a function or method how many arguments it takes at most.

import { readFileSync } from 'node:fs';
import ts from 'typescript';

const [path] = process.argv.slice(2);
const file = ts.createSourceFile(path, readFileSync(path, 'utf8'), ts.ScriptTarget.Latest, true);
const has = (node, kind) => ts.canHaveModifiers(node) && ts.getModifiers(node)?.some((it) => it.kind === kind);
const classes = new Map();
const exported = {};

/** Members by name, with those of the class that it extends if that is in the file; # and _ are nobody's business. */
function members(node) {
  const parent = node.heritageClauses?.[0]?.types[0]?.expression.text;
  const found = classes.has(parent) ? members(classes.get(parent)) : {};
  for (const member of node.members) {
    const name = member.name?.text ?? 'constructor';
    if (member.name && (ts.isPrivateIdentifier(member.name) || name.startsWith('_'))) continue;
    if (ts.isConstructorDeclaration(member)) continue;
    const isMethod = ts.isMethodDeclaration(member) || ts.isMethodSignature(member);
    found[name] = isMethod ? member.parameters.length : 'field';
  }
  return found;
}

for (const node of file.statements) {
  if (ts.isClassDeclaration(node)) classes.set(node.name.text, node);
  if (!has(node, ts.SyntaxKind.ExportKeyword)) continue;
  if (ts.isClassDeclaration(node)) exported[node.name.text] = members(node);
  else if (ts.isVariableStatement(node)) {
    for (const { name, type, initializer } of node.declarationList.declarations) {
      const value = initializer?.arguments?.[0] ?? type?.typeArguments?.[0];
      const entries = value?.properties ?? value?.members ?? [];
      exported[name.text] = Object.fromEntries(
        entries.map((it) => [it.name.text, Number((it.initializer ?? it.type.literal).text)]),
      );
    }
  } else if (ts.isFunctionDeclaration(node)) exported[node.name.text] = node.parameters.length;
}
console.log(JSON.stringify(exported));
