-- Publish what a process holds: the buckets that changed, the summary over all, and a note to the
-- worker. All of it is one instant, so a reader never sees a mixture.
--
-- KEYS  1 inventory (hash)   2 inbox (stream)   3 seqs
-- ARGV  1 process   2 summary   3 root digest   4 note for the worker
--       5.. bucket number, its digest, its content ("" drops the bucket)
-- Answer  1
-- Errors  FENCED   the process was declared lost
if redis.call('HGET', KEYS[3], ARGV[1]) == 'lost' then return redis.error_reply('FENCED') end
redis.call('HSET', KEYS[1], 'summary', ARGV[2], 'root', ARGV[3])
for i = 5, #ARGV, 3 do
  if ARGV[i + 2] == '' then
    redis.call('HDEL', KEYS[1], ARGV[i], '#' .. ARGV[i])
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2], '#' .. ARGV[i], ARGV[i + 1])
  end
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10000, '*', 'm', ARGV[4])
return 1
