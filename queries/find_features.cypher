// Which features are there, by a part of their label, by layer and site, and by how often they fire?
//
// Parameters:
//   text: string = null; e.g. "states"; a part of the label, in capitals or not
//   layer: integer 0.. = null; e.g. 2; features of this layer only
//   site: attn|mlp = null; e.g. "mlp"; features of this site only
//   min_prompts: integer 0.. = 0; e.g. 5; the fewest stored prompts in which it fires
//   max_prompts: integer 0.. = null; e.g. 50; the most stored prompts in which it fires
//   limit: integer 1.. = 100; e.g. 20; the most rows to return
//
// Columns, those that fire in most prompts first:
//   feature*: string; id of the feature
//   label*: string; its label, where it has one
//   layer*: integer; its layer
//   site*: string; attn or mlp
//   index: integer; its place in its dictionary
//   n_prompts*: integer; stored prompts in which it fires
//   density*: float; share of tokens on which it fires, where its dictionary came with that
//   max_activation: float; its largest activation, where its dictionary came with that
//
// In Neo4j Browser, first:
//   :param {text: "states", layer: null, site: null, min_prompts: 0, max_prompts: null, limit: 20}

MATCH (f:Feature)
WHERE ($layer IS NULL OR f.layer = $layer)
  AND ($site IS NULL OR f.site = $site)
  AND ($text IS NULL OR toLower(f.label) CONTAINS toLower($text))
WITH f, coalesce(f.n_prompts, 0) AS n_prompts
WHERE n_prompts >= $min_prompts AND ($max_prompts IS NULL OR n_prompts <= $max_prompts)
WITH f, n_prompts
ORDER BY n_prompts DESC, f.id
LIMIT toInteger($limit)
RETURN f.id AS feature,
       f.label AS label,
       f.layer AS layer,
       f.site AS site,
       f.index AS index,
       n_prompts,
       f.density AS density,
       f.max_activation AS max_activation
ORDER BY n_prompts DESC, feature
