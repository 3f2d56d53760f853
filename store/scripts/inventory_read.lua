-- Read an inventory: the summary, and of the buckets only those whose digest the reader does not
-- have. The comparison happens here, so that what has not changed is not moved.
--
-- KEYS  1 inventory (hash)
-- ARGV  1.. bucket number, digest known to the reader
-- Answer  {summary, bucket, content, bucket, content, ...}; {} when there is no inventory, or none
--         that can be read.
--         A bucket the reader knows and the host no longer has comes with empty content.
local summary = redis.call('HGET', KEYS[1], 'summary')
if not summary then return {} end
local known = {}
for i = 1, #ARGV, 2 do known[ARGV[i]] = ARGV[i + 1] end
local answer = {summary}
local readable, decoded = pcall(cjson.decode, summary)
local digests = readable and type(decoded) == 'table' and decoded['digests']
if type(digests) ~= 'table' then return {} end
for bucket, digest in pairs(digests) do
  if known[bucket] ~= digest then
    answer[#answer + 1] = bucket
    answer[#answer + 1] = redis.call('HGET', KEYS[1], bucket) or ''
  end
end
for bucket, _ in pairs(known) do
  if not digests[bucket] then
    answer[#answer + 1] = bucket
    answer[#answer + 1] = ''
  end
end
return answer
