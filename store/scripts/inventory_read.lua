-- Read an inventory: the summary, and of the buckets only those whose digest the reader does not
-- have. The comparison happens here, so that what has not changed is not moved. A reader that knows
-- something asks with its root digest first: where nothing changed, that is all that travels.
--
-- KEYS  1 inventory (hash)
-- ARGV  1 number of buckets   2 root digest known to the reader: asks only whether it is still that;
--       "" asks for the buckets   3.. bucket number, digest known to the reader
-- Answer  {} no inventory   {summary} the root is the one known   {summary, root} it is another
--         {summary, root, bucket, digest, content, ...} a bucket that is gone has no content
local head = redis.call('HMGET', KEYS[1], 'summary', 'root')
if not head[1] or not head[2] then return {} end
if head[2] == ARGV[2] then return {head[1]} end
if ARGV[2] ~= '' then return head end
local known, fields = {}, {}
for i = 3, #ARGV, 2 do known[ARGV[i]] = ARGV[i + 1] end
for bucket = 0, tonumber(ARGV[1]) - 1 do fields[#fields + 1] = '#' .. bucket end
local digests = redis.call('HMGET', KEYS[1], unpack(fields))
for index, digest in ipairs(digests) do
  local bucket = tostring(index - 1)
  if (digest or '') ~= (known[bucket] or '') then
    head[#head + 1] = bucket
    head[#head + 1] = digest or ''
    head[#head + 1] = digest and redis.call('HGET', KEYS[1], bucket) or ''
  end
end
return head
