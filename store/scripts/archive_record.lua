-- Record that a segment was written to the archive, read back and found right.
--
-- KEYS  1 lease   2 history
-- ARGV  1 "holder epoch"   2 the position the segment begins after   3 id of its last entry   4 its digest
-- Answer  1
-- Errors  FENCED   the lease is not held under this epoch any more, or the segment does not follow the
--                  last one; nothing is written
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end
local known = redis.call('HMGET', KEYS[2], 'archived', 'dropped')
local after = known[1] or known[2] or '0-0'
if ARGV[2] ~= after and ARGV[2] ~= known[2] then return redis.error_reply('FENCED') end
redis.call('HSET', KEYS[2], 'archived', ARGV[3], 'segment', ARGV[4])
return 1
