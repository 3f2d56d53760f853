-- Publish what a process holds: the buckets that changed, the summary over all, and a note to the
-- worker. All of it is one instant, so a reader never sees a mixture. Publications are numbered: one
-- that does not follow the last (Redis failed over and forgot some) is not taken, and the host sends
-- everything anew as number 1.
--
-- KEYS  1 inventory (hash)   2 inbox (stream)   3 seqs
-- ARGV  1 process   2 summary   3 root digest   4 note for the worker   5 number of the publication
--       6.. bucket number, its digest, its content ("" drops the bucket)
-- Answer  1, or 0 when it does not follow the last; then nothing is written
-- Errors  FENCED   the process was declared lost
if redis.call('HGET', KEYS[3], ARGV[1]) == 'lost' then return redis.error_reply('FENCED') end
if ARGV[5] == '1' then
  redis.call('DEL', KEYS[1])
elseif redis.call('HGET', KEYS[1], 'number') ~= tostring(tonumber(ARGV[5]) - 1) then
  return 0
end
redis.call('HSET', KEYS[1], 'summary', ARGV[2], 'root', ARGV[3], 'number', ARGV[5])
for i = 6, #ARGV, 3 do
  if ARGV[i + 2] == '' then
    redis.call('HDEL', KEYS[1], ARGV[i], '#' .. ARGV[i])
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2], '#' .. ARGV[i], ARGV[i + 1])
  end
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10000, '*', 'm', ARGV[4])
return 1
